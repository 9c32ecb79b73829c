"""The offline engines on a tiny model: vLLM's names, shapes and behaviour."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import AutoModelForCausalLM

from lorafleet.workers import (
    LLM,
    AsyncLLM,
    EngineArgs,
    LLMEngine,
    LoRARequest,
    RequestOutput,
    SamplingParams,
    StructuredOutputsParams,
)
from lorafleet.workers.errors import (
    AdapterConflictError,
    AdapterRefusedError,
    ConfigError,
    ContextLengthError,
    DrainingError,
    InternalError,
    InvalidRequestError,
    LoRAFleetError,
    ModelError,
)
from lorafleet.workers.offline.text_requests import Prompt

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llm")
    model = tiny.make_model("smollm2", root / "model")
    tiny.save_tokenizer(root / "model")
    for i, name in enumerate(("sql", "pirate")):
        tiny.make_adapter(copy.deepcopy(model), root / name, seed=i + 1)
    return root


@pytest.fixture(scope="module")
def llm(root: Path) -> Iterator[LLM]:
    with LLM(model=str(root / "model"), enable_lora=True, dtype="float32", seed=0) as llm:
        yield llm


def lora(root: Path, name: str, number: int) -> LoRARequest:
    return LoRARequest(name, number, str(root / name))


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_ids_that_an_adapter_adds_may_be_in_its_requests(llm: LLM, root: Path) -> None:
    wide = AutoModelForCausalLM.from_pretrained(root / "model")
    wide.resize_token_embeddings(133, mean_resizing=False)
    adapted = tiny.make_adapter(wide, root / "wide")
    params = dataclasses.replace(GREEDY, stop_token_ids=[132])
    request, prompt = lora(root, "wide", 19), [40, 131, 132]
    (output,) = llm.generate([prompt], params, lora_request=request, use_tqdm=False)
    assert output.outputs[0].token_ids == tiny.greedy(adapted, prompt, len(output.outputs[0].token_ids))
    for ids, options in ((prompt, GREEDY), ([40], params)):
        with pytest.raises(InvalidRequestError, match=r"13[0-2]"):
            llm.generate([ids], options, use_tqdm=False)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_rules_about_tokens_know_the_ids_of_the_rows_adapter_and_change_no_other_row(llm: LLM, root: Path) -> None:
    wide = AutoModelForCausalLM.from_pretrained(root / "model")
    wide.resize_token_embeddings(133, mean_resizing=False)
    tiny.make_adapter(wide, root / "wider")
    request, prompt = lora(root, "wider", 23), [40, 41, 42]
    only_new = dataclasses.replace(GREEDY, allowed_token_ids=[131, 132])
    pushed = dataclasses.replace(GREEDY, logit_bias={132: 100})
    (plain,) = llm.generate([prompt], GREEDY, use_tqdm=False)
    outputs = llm.generate(
        [prompt] * 3, [only_new, pushed, GREEDY], lora_request=[request, request, None], use_tqdm=False
    )
    allowed, biased, beside = (output.outputs[0].token_ids for output in outputs)
    assert set(allowed) <= {131, 132} and set(biased) == {132}
    assert beside == plain.outputs[0].token_ids
    for params in (only_new, pushed):
        with pytest.raises(InvalidRequestError, match="has 132; the vocabulary ends at 130"):
            llm.generate([prompt], params, use_tqdm=False)


def test_the_tokens_of_bad_words_come_neither_first_nor_after_a_space(llm: LLM) -> None:
    words, tokenizer = ["the", "fox", "q", "o", " d", "over"], llm.get_tokenizer()
    forbidden = [tokenizer.encode(form) for word in words for form in (word.lstrip(), f" {word.lstrip()}")]
    assert {len(ids) for ids in forbidden} == {1, 2}

    def outputs(bad_words: list[str]) -> list[list[int]]:
        hot = dataclasses.replace(GREEDY, temperature=2.0, max_tokens=60, bad_words=bad_words)
        params = [dataclasses.replace(hot, seed=seed) for seed in range(8)]
        return [list(output.outputs[0].token_ids) for output in llm.generate(["the quick"] * 8, params, use_tqdm=False)]

    def num_found(outputs: list[list[int]]) -> int:
        return sum(ids[i : i + len(own)] == own for ids in outputs for own in forbidden for i in range(len(ids)))

    assert num_found(outputs([])) > 5
    assert num_found(outputs(words)) == 0


def test_generate_has_vllms_shape(llm: LLM) -> None:
    (output,) = llm.generate("the quick", GREEDY, use_tqdm=False)
    assert output.prompt == "the quick"
    assert output.prompt_token_ids == llm.get_tokenizer().encode("the quick")
    assert output.finished and output.lora_request is None
    (choice,) = output.outputs
    assert choice.index == 0 and choice.finish_reason == "length" and choice.stop_reason is None
    assert len(choice.token_ids) == 12
    assert choice.text == llm.get_tokenizer().decode(choice.token_ids)
    assert choice.logprobs is None and choice.cumulative_logprob is None


def test_one_lora_request_for_all_or_one_each(llm: LLM, root: Path) -> None:
    prompts = ["the fox", "the dog", "the end"]
    base = texts(llm.generate(prompts, GREEDY, use_tqdm=False))
    sql = texts(llm.generate(prompts, GREEDY, lora_request=lora(root, "sql", 1), use_tqdm=False))
    mixed = [None, lora(root, "sql", 1), lora(root, "pirate", 2)]
    assert base != sql
    outputs = llm.generate(prompts, GREEDY, lora_request=mixed, use_tqdm=False)
    assert texts(outputs)[:2] == [base[0], sql[1]]
    assert outputs[2].lora_request == mixed[2]
    with pytest.raises(InvalidRequestError, match="2 entries for 3 prompts"):
        llm.generate(prompts, GREEDY, lora_request=mixed[:2], use_tqdm=False)


def test_one_id_stands_for_one_adapter(llm: LLM, root: Path) -> None:
    llm.generate("a", GREEDY, lora_request=lora(root, "sql", 1), use_tqdm=False)
    with pytest.raises(AdapterConflictError, match="lora_int_id 1 stands for 'sql'"):
        llm.generate("a", GREEDY, lora_request=lora(root, "pirate", 1), use_tqdm=False)


def test_prompts_may_be_text_ids_or_mappings(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("over the lazy dog")
    prompts: list[Prompt | Mapping[str, Any]] = ["over the lazy dog", ids]
    prompts += [{"prompt": "over the lazy dog"}, {"prompt_token_ids": ids}]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert len(set(texts(outputs))) == 1
    assert [output.prompt is None for output in outputs] == [False, True, False, True]


@pytest.mark.parametrize(
    ("prompts", "part"),
    [
        (None, "prompts is None"),
        (5, "prompts is 5"),
        (b"ab", "prompts is b'ab'"),
        ([None], "A prompt is None"),
        ([5], "A prompt is 5"),
        ([["a"]], "list of integers"),
        ([[1.0]], "list of integers"),
        ([[10**5000]], "16610 bits"),
        ([[-1]], "token id -1"),
        ([[]], "empty"),
        ({"prompt": 5}, "mapping"),
        ({"prompt_token_ids": None}, "A prompt is None"),
        ({"x" * 1_000_000: 1}, "mapping"),
        ("a" * 1_000_000, "1000000 characters"),
    ],
)
def test_what_is_no_prompt_is_named(llm: LLM, prompts: Any, part: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        llm.generate(prompts, GREEDY, use_tqdm=False)
    assert part in caught.value.message
    assert len(caught.value.message) < 500
    with pytest.raises(InvalidRequestError, match="sampling_params is 'x'"):
        llm.generate("a", "x", use_tqdm=False)  # type: ignore[arg-type]
    assert not llm.llm_engine.has_unfinished_requests()


@pytest.mark.parametrize("messages", [None, 5, "hi", [], [5], [[5]], [[]], [{"role": "user", "content": 5}]])
def test_what_are_no_messages_is_named(llm: LLM, messages: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        llm.chat(messages, GREEDY, use_tqdm=False)
    assert caught.value.param == "messages"


def test_chat_goes_through_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(messages, GREEDY, use_tqdm=False)
    assert output.prompt_token_ids == llm.get_tokenizer().encode("<user>hi\n<assistant>", add_special_tokens=False)
    assert len(llm.chat([messages, messages], GREEDY, use_tqdm=False)) == 2


def test_tools_are_described_in_the_prompt(llm: LLM) -> None:
    tools = [{"type": "function", "function": {"name": "now", "description": "the fox " * 100}}]
    with pytest.raises(ContextLengthError, match=r"The prompt has [4-9]\d\d tokens"):
        llm.chat([{"role": "user", "content": "hi"}], GREEDY, use_tqdm=False, tools=tools)


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    (full,) = llm.generate("the fox", GREEDY, use_tqdm=False)
    text = full.outputs[0].text
    stop = text[4:6]
    (output,) = llm.generate(
        "the fox", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=[stop]), use_tqdm=False
    )
    choice = output.outputs[0]
    assert choice.text == text[: text.index(stop)]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    assert len(choice.token_ids) < 12


def test_a_stop_token_is_counted_but_not_shown(llm: LLM) -> None:
    (full,) = llm.generate("the fox", GREEDY, use_tqdm=False)
    token = full.outputs[0].token_ids[3]
    first = full.outputs[0].token_ids.index(token)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=[token])
    (output,) = llm.generate("the fox", params, use_tqdm=False)
    choice = output.outputs[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", token)
    assert choice.token_ids == full.outputs[0].token_ids[: first + 1]
    assert choice.text == llm.get_tokenizer().decode(choice.token_ids[:-1])


def test_n_choices_differ_and_a_seed_repeats_them(llm: LLM) -> None:
    params = SamplingParams(n=4, temperature=1.5, max_tokens=10, seed=7, ignore_eos=True)
    (first,) = llm.generate("the", params, use_tqdm=False)
    again = llm.generate(["dog", "the"], params, use_tqdm=False)[1]
    assert [choice.index for choice in first.outputs] == [0, 1, 2, 3]
    assert len({choice.text for choice in first.outputs}) > 1
    assert [choice.token_ids for choice in first.outputs] == [choice.token_ids for choice in again.outputs]


def test_logprobs_come_with_rank_and_text(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=2, ignore_eos=True)
    (output,) = llm.generate("the fox", params, use_tqdm=False)
    choice = output.outputs[0]
    assert choice.logprobs is not None and len(choice.logprobs) == 3
    for token_id, row in zip(choice.token_ids, choice.logprobs, strict=True):
        assert len(row) == 2 and next(iter(row)) == token_id
        assert row[token_id].rank == 1
        assert row[token_id].decoded_token == llm.get_tokenizer().decode_token(token_id)
    assert choice.cumulative_logprob == pytest.approx(
        sum(row[t].logprob for t, row in zip(choice.token_ids, choice.logprobs, strict=True))
    )


@pytest.mark.parametrize(
    ("prompts", "params", "error", "message"),
    [
        ("", GREEDY, InvalidRequestError, "empty"),
        ([["not", "ids"]], GREEDY, InvalidRequestError, "integers"),
        ([[5, 99999]], GREEDY, InvalidRequestError, "token id"),
        ({"text": "a"}, GREEDY, InvalidRequestError, "'prompt'"),
        ("the " * 400, GREEDY, ContextLengthError, "context of 256 tokens"),
        ("a", SamplingParams(max_tokens=300), ContextLengthError, "at most"),
    ],
)
def test_a_bad_prompt_among_good_ones_leaves_nothing_behind(
    llm: LLM, prompts: object, params: SamplingParams, error: type[LoRAFleetError], message: str
) -> None:
    good = ["the fox"] if isinstance(prompts, list) else []
    batch = good + prompts if isinstance(prompts, list) else prompts
    with pytest.raises(error, match=message):
        llm.generate(batch, params, use_tqdm=False)  # type: ignore[arg-type]
    assert not llm.llm_engine.has_unfinished_requests()
    assert not llm.llm_engine.engine.has_unfinished()
    llm.llm_engine.engine.check_integrity()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_loras": 2}, ConfigError, "enable_lora"),
        ({"enable_lora": True, "max_loras": 4, "max_cpu_loras": 2}, ConfigError, "max-cpu-loras"),
        ({"dtype": "int3"}, ConfigError, "int3"),
        ({"block_size": 7}, ConfigError, "block-size"),
        ({"tensor_parallel_size": 2}, ConfigError, "tensor_parallel_size"),
        ({"max_model_len": 100_000}, ConfigError, "256 positions"),
        ({"kv_cache_memory_bytes": 1000}, ConfigError, "--kv-cache-memory-bytes"),
        ({"model": "/no/such/model"}, ModelError, "/no/such/model"),
    ],
)
def test_what_cannot_start_says_why(
    root: Path, arguments: dict[str, object], error: type[LoRAFleetError], message: str
) -> None:
    with pytest.raises(error, match=message):
        LLM(**{"model": str(root / "model"), **arguments})  # type: ignore[arg-type]


def test_an_adapter_of_another_base_is_refused(llm: LLM, tmp_path: Path) -> None:
    model = tiny.make_model("qwen3", tmp_path / "model")
    tiny.make_adapter(model, tmp_path / "adapter")
    with pytest.raises(AdapterRefusedError) as caught:
        llm.generate("a", GREEDY, lora_request=LoRARequest("wrong", 9, str(tmp_path / "adapter")), use_tqdm=False)
    assert caught.value.reason == "wrong_shape"


# An example of vLLM's documentation: requests for the base model and two adapters, one slot, added one by one.


def multilora_prompts(root: Path) -> list[tuple[str, SamplingParams, LoRARequest | None]]:
    sql, pirate = lora(root, "sql", 1), lora(root, "pirate", 2)
    params = SamplingParams(temperature=0, logprobs=1, max_tokens=10, ignore_eos=True)
    both = SamplingParams(n=3, temperature=0.8, top_p=0.9, max_tokens=10, seed=3, ignore_eos=True)
    return [
        ("the quick", params, None),
        ("the brown", params, sql),
        ("the lazy", params, pirate),
        ("the dog", both, sql),
        ("the fox", params, None),
        ("the end", both, pirate),
    ]


def args(root: Path) -> EngineArgs:
    return EngineArgs(
        model=str(root / "model"), enable_lora=True, max_loras=1, max_lora_rank=8, max_cpu_loras=2, dtype="float32"
    )


def test_requests_are_added_one_by_one_and_stepped(root: Path, llm: LLM) -> None:
    prompts = multilora_prompts(root)
    engine = LLMEngine.from_engine_args(args(root))
    finished: dict[str, RequestOutput] = {}
    pending = list(enumerate(prompts))
    while pending or engine.has_unfinished_requests():
        if pending:
            number, (prompt, params, lora_request) = pending.pop(0)
            engine.add_request(str(number), prompt, params, lora_request)
        for output in engine.step():
            if output.finished:
                assert output.request_id not in finished
                finished[output.request_id] = output
    engine.close()
    alone = [llm.generate(p, params, lora_request=r, use_tqdm=False)[0] for p, params, r in prompts]
    for number, expected in enumerate(alone):
        got = finished[str(number)]
        assert [choice.text for choice in got.outputs] == [choice.text for choice in expected.outputs]


@pytest.fixture
async def async_llm(root: Path) -> AsyncIterator[AsyncLLM]:
    engine = await AsyncLLM.from_engine_args(args(root))
    yield engine
    await engine.close()


async def test_requests_are_awaited_together(root: Path, llm: LLM, async_llm: AsyncLLM) -> None:
    prompts = multilora_prompts(root)

    async def last(number: int) -> RequestOutput:
        prompt, params, lora_request = prompts[number]
        lengths = []
        async for output in async_llm.generate(prompt, params, str(number), lora_request):
            lengths.append(sum(len(choice.token_ids) for choice in output.outputs))
        assert lengths == sorted(lengths) and len(lengths) > 1
        return output

    outputs = await asyncio.gather(*(last(number) for number in range(len(prompts))))
    for (prompt, params, lora_request), got in zip(prompts, outputs, strict=True):
        (expected,) = llm.generate(prompt, params, lora_request=lora_request, use_tqdm=False)
        assert [choice.text for choice in got.outputs] == [choice.text for choice in expected.outputs]


async def test_leaving_the_iteration_cancels_the_request(async_llm: AsyncLLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    generation = async_llm.generate("the", params, "left")
    await anext(generation)
    assert isinstance(generation, AsyncGenerator)
    await generation.aclose()
    # The id is free again, and nothing of the old request reaches the new one.
    outputs = [output async for output in async_llm.generate("the", GREEDY, "left")]
    assert len(outputs[-1].outputs[0].token_ids) == 12


async def test_an_error_reaches_its_awaiter_only(root: Path, async_llm: AsyncLLM) -> None:
    with pytest.raises(ContextLengthError):
        await anext(async_llm.generate("a", SamplingParams(max_tokens=1000), "bad"))
    with pytest.raises(AdapterRefusedError):
        await anext(async_llm.generate("a", GREEDY, "missing", LoRARequest("gone", 5, str(root / "gone"))))
    assert [output async for output in async_llm.generate("a", GREEDY, "good")][-1].finished


def test_adapters_are_added_listed_replaced_in_place_and_removed(llm: LLM, root: Path) -> None:
    engine = llm.llm_engine
    ids = engine.list_loras()
    sql, pirate = (
        texts(llm.generate("the fox", GREEDY, lora_request=lora(root, name, number), use_tqdm=False))
        for name, number in (("sql", 11), ("pirate", 12))
    )
    assert engine.list_loras() == ids | {11, 12}
    assert engine.add_lora(lora(root, "sql", 13))
    with pytest.raises(AdapterConflictError, match="load_inplace"):
        engine.add_lora(lora(root, "pirate", 13))
    assert texts(llm.generate("the fox", GREEDY, lora_request=lora(root, "sql", 13), use_tqdm=False)) == sql
    assert engine.add_lora(LoRARequest("pirate", 13, str(root / "pirate"), load_inplace=True))
    assert texts(llm.generate("the fox", GREEDY, lora_request=lora(root, "pirate", 13), use_tqdm=False)) == pirate
    assert all(engine.remove_lora(number) for number in (11, 12, 13))
    assert not engine.remove_lora(11)
    assert engine.list_loras() == ids


async def test_removing_awaits_the_requests(root: Path) -> None:
    llm = await AsyncLLM.from_engine_args(EngineArgs(model=str(root / "model"), enable_lora=True, dtype="float32"))
    try:
        request = lora(root, "sql", 1)
        assert await llm.add_lora(request) and await llm.list_loras() == {1}
        outputs = llm.generate("the fox", GREEDY, "one", request)
        await anext(outputs)
        removing = asyncio.ensure_future(llm.remove_lora(1))
        last = [output async for output in outputs][-1]
        assert last.finished and last.outputs[0].finish_reason == "length"
        assert await removing
        assert llm.engine.stats().device_adapters == ()
        assert not await llm.remove_lora(1)
    finally:
        await llm.close()


def test_any_number_of_prompts_and_choices_is_generated(root: Path) -> None:
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    with LLM(model=str(root / "model"), dtype="float32", kv_cache_memory_bytes=4_000_000) as llm:
        outputs = llm.generate([[5, 6 + number % 100] for number in range(5000)], params, use_tqdm=False)
        assert len(outputs) == 5000 and all(output.finished for output in outputs)
        alone = llm.generate([[5, 6 + number] for number in range(100)], params, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs[-100:]] == [
            output.outputs[0].token_ids for output in alone
        ]
        many = dataclasses.replace(params, n=16, temperature=1.0)
        outputs = llm.generate([[5, 6]] * 300, many, use_tqdm=False)
        assert [len(output.outputs) for output in outputs] == [16] * 300
        with pytest.raises(InvalidRequestError, match="token id"):
            llm.generate([[5, 6]] * 5000 + [[5, 999]], params, use_tqdm=False)
        assert not llm.llm_engine.has_unfinished_requests()


def test_a_bound_on_waiting_is_kept_to_by_feeding_as_many_as_it_takes(root: Path, tmp_path: Path) -> None:
    requests = []
    for number in range(12):  # of as many contents
        shutil.copytree(root / "sql", tmp_path / f"{number}")
        config = json.loads((tmp_path / f"{number}" / "adapter_config.json").read_text())
        config["lora_alpha"] = number + 1
        (tmp_path / f"{number}" / "adapter_config.json").write_text(json.dumps(config))
        requests.append(LoRARequest(f"{number}", number + 1, str(tmp_path / f"{number}")))
    with LLM(
        model=str(root / "model"),
        enable_lora=True,
        dtype="float32",
        max_loras=1,
        max_num_seqs=1,
        max_adapter_wait_s=1.0,
        kv_cache_memory_bytes=4_000_000,
    ) as llm:
        outputs = llm.generate(["the fox"] * 12, GREEDY, lora_request=requests, use_tqdm=False)
    assert all(output.finished and output.error is None for output in outputs)


def test_an_idle_engine_steps_at_once_and_says_that_there_is_nothing(root: Path) -> None:
    engine = LLMEngine.from_engine_args(args(root))
    assert engine.step() == [] and not engine.has_unfinished_requests()
    engine.add_request("a", [5, 6], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
    assert [[output.finished for output in engine.step()] for _ in range(2)] == [[False], [True]]
    assert engine.step() == []
    engine.close()


def test_a_closed_engine_says_so(root: Path) -> None:
    llm = LLM(model=str(root / "model"), enable_lora=True, dtype="float32", kv_cache_memory_bytes=4_000_000)
    llm.llm_engine.add_request("open", "the fox", GREEDY)
    llm.close()
    llm.close()
    request = lora(root, "sql", 1)
    calls: list[Callable[[], object]] = [
        lambda: llm.generate("the fox", GREEDY, use_tqdm=False),
        lambda: llm.generate("the fox", GREEDY, lora_request=request, use_tqdm=False),
        lambda: llm.chat([{"role": "user", "content": "hi"}], GREEDY, lora_request=request, use_tqdm=False),
        lambda: llm.llm_engine.add_lora(request),
        lambda: llm.llm_engine.remove_lora(1),
    ]
    for call in calls:
        with pytest.raises(DrainingError, match="closed"):
            call()
    assert not llm.llm_engine.has_unfinished_requests() and llm.llm_engine.step() == []


def test_after_a_step_that_failed_every_call_says_so_and_none_hangs(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(model=str(root / "model"), dtype="float32", kv_cache_memory_bytes=4_000_000) as llm:

        def fail(plan: object) -> None:
            raise RuntimeError("a kernel failed")

        with monkeypatch.context() as patched:
            patched.setattr(llm.llm_engine.engine._runner, "forward", fail)
            with pytest.raises(RuntimeError, match="a kernel failed"):
                llm.generate(["the fox", "the dog"], GREEDY, use_tqdm=False)
        assert not llm.llm_engine.has_unfinished_requests()
        with pytest.raises(InternalError, match="A step of the engine failed"):
            llm.generate("the fox", GREEDY, use_tqdm=False)


def test_an_adapters_own_template_and_tokenizer_are_used_for_its_requests(llm: LLM, root: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(root / "sql", own)
    (own / "chat_template.jinja").write_text("[{{ messages[0]['content'] }}]")
    request = LoRARequest("own", 21, str(own))
    messages = [{"role": "user", "content": "hi"}]
    with_own, without = llm.chat([messages] * 2, GREEDY, lora_request=[request, lora(root, "sql", 22)], use_tqdm=False)
    assert with_own.prompt_token_ids == llm.get_tokenizer().encode("[hi]", add_special_tokens=False)
    assert without.prompt_token_ids == llm.get_tokenizer().encode("<user>hi\n<assistant>", add_special_tokens=False)

    vocabulary = json.loads((root / "model" / "tokenizer.json").read_text())
    words = {token_id: word for word, token_id in vocabulary["model"]["vocab"].items()}
    words[5], words[6] = words[6], words[5]
    vocabulary["model"]["vocab"] = {word: token_id for token_id, word in words.items()}
    (own / "tokenizer.json").write_text(json.dumps(vocabulary))
    swapped = LoRARequest("own", 21, str(own), load_inplace=True)
    assert llm.llm_engine.add_lora(swapped)
    model, adapter = llm.get_tokenizer(), llm.get_tokenizer(swapped)
    assert adapter.decode([5, 6]) == model.decode([6, 5])
    (output,) = llm.generate([[9, 8]], GREEDY, lora_request=swapped, use_tqdm=False)
    assert output.outputs[0].text == adapter.decode(output.outputs[0].token_ids)


def structured(**fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=200, seed=1, structured_outputs=StructuredOutputsParams(**fields))


def test_structured_outputs_are_followed_beside_others(llm: LLM, root: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    asked = [
        structured(json=schema, disable_any_whitespace=True, disable_additional_properties=True),
        structured(choice=["yes", "no"]),
        structured(regex="[ab]{3}"),
        structured(grammar='root ::= "x" "y"+ "z"'),
    ]
    loras = [None, lora(root, "sql", 1), lora(root, "pirate", 2), None]
    alone = llm.generate(["free"], GREEDY, use_tqdm=False)
    outputs = llm.generate(["hello"] * 4 + ["free"], [*asked, GREEDY], lora_request=[*loras, None], use_tqdm=False)
    assert texts(outputs[4:]) == texts(alone)
    document, choice, match, word = texts(outputs[:4])
    assert json.loads(document) in ({"a": True}, {"a": False})
    assert choice in ("yes", "no") and len(match) == 3 and set(match) <= set("ab")
    assert word.startswith("xy") and word.endswith("yz")
    assert {output.outputs[0].finish_reason for output in outputs[:4]} == {"stop"}
    assert all(output.outputs[0].stop_reason is None for output in outputs[:4])


def test_structured_outputs_that_cannot_be_enforced_are_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match=r"structured_outputs cannot be enforced.*unclosed"):
        llm.generate(["hello", "hello"], [GREEDY, structured(regex="(a")], use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="give StructuredOutputsParams"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]
    assert not llm.llm_engine.has_unfinished_requests()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_a_grammar_knows_the_tokens_that_an_adapters_tokenizer_adds(llm: LLM, root: Path) -> None:
    wide = AutoModelForCausalLM.from_pretrained(root / "model")
    wide.resize_token_embeddings(132, mean_resizing=False)
    tiny.make_adapter(wide, root / "calls")
    files = json.loads((root / "model" / "tokenizer.json").read_text())
    call = {"id": 131, "content": "<call>", "special": True, "normalized": False}
    files["added_tokens"].append(call | dict.fromkeys(("single_word", "lstrip", "rstrip"), False))
    (root / "calls" / "tokenizer.json").write_text(json.dumps(files))
    params = structured(grammar='start: <call> "ab"')
    (output,) = llm.generate(["hello"], params, lora_request=lora(root, "calls", 44), use_tqdm=False)
    assert output.outputs[0].token_ids[0] == 131 and output.outputs[0].text == "ab"
    with pytest.raises(InvalidRequestError, match="call"):  # the base model has no such token
        llm.generate(["hello"], params, use_tqdm=False)
