"""A lora_int_id stands for the current content of its files, whatever was requested before."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny

from lorafleet.workers import LLM, LoRARequest, SamplingParams
from lorafleet.workers.errors import AdapterConflictError, AdapterRefusedError
from lorafleet.workers.text import adapter_tokenizers

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
NAMES = ("one", "two")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ids")
    model = tiny.make_model("smollm2", root / "model")
    tiny.save_tokenizer(root / "model")
    tiny.make_adapters(model, root, NAMES, strength=0.3)
    return root


@pytest.fixture(scope="module")
def llm(root: Path) -> Iterator[LLM]:
    with LLM(str(root / "model"), enable_lora=True, max_loras=2, dtype="float32", seed=0) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(llm: LLM, root: Path) -> dict[str, list[int]]:
    """The answer of each adapter."""
    answers = {name: answer(llm, LoRARequest(name, 900 + n, str(root / name))) for n, name in enumerate(NAMES)}
    assert answers["one"] != answers["two"]
    return answers


@pytest.fixture
def policy(root: Path, tmp_path: Path) -> Path:
    """A directory with adapter one, which training overwrites later."""
    shutil.copytree(root / "one", tmp_path / "policy")
    return tmp_path / "policy"


@pytest.fixture(autouse=True)
def no_ids_are_left(llm: LLM) -> Iterator[None]:
    yield
    for number in llm.llm_engine.list_loras():
        if number < 900:
            llm.llm_engine.remove_lora(number)


def answer(llm: LLM, request: LoRARequest | None) -> list[int]:
    (output,) = llm.generate("the fox", GREEDY, lora_request=request, use_tqdm=False)
    return output.outputs[0].token_ids


def overwrite(policy: Path, other: Path) -> None:
    for file in other.iterdir():
        shutil.copy(file, policy / file.name)


def replace_each(policy: Path, other: Path) -> None:
    for file in other.iterdir():
        shutil.copy(file, policy / "new")
        (policy / "new").replace(policy / file.name)


def replace_all(policy: Path, other: Path) -> None:
    shutil.rmtree(policy)
    shutil.copytree(other, policy)


@pytest.mark.parametrize("change", [overwrite, replace_each, replace_all])
@pytest.mark.parametrize("load_inplace", [False, True])
def test_changed_files_answer_under_the_same_id_and_path(
    change: Callable[[Path, Path], None],
    load_inplace: bool,
    llm: LLM,
    root: Path,
    policy: Path,
    expected: dict[str, list[int]],
) -> None:
    assert answer(llm, LoRARequest("policy", 1, str(policy))) == expected["one"]
    for name in ("two", "one", "two"):
        change(policy, root / name)
        request = LoRARequest("policy", 1, str(policy), load_inplace=load_inplace)
        assert answer(llm, request) == expected[name]
        assert answer(llm, request) == expected[name]
    assert len(llm.llm_engine.engine.stats().registered_adapters) == 2, "of the two that the fixture named"


def test_a_link_to_the_newest_checkpoint_is_followed_each_time(
    llm: LLM, root: Path, tmp_path: Path, expected: dict[str, list[int]]
) -> None:
    latest = tmp_path / "latest"
    for name in ("one", "two", "one"):
        latest.unlink(missing_ok=True)
        latest.symlink_to(root / name)
        assert answer(llm, LoRARequest("policy", 2, str(latest))) == expected[name]


def test_load_inplace_gives_an_id_another_path_and_without_it_that_is_a_conflict(
    llm: LLM, root: Path, expected: dict[str, list[int]]
) -> None:
    assert answer(llm, LoRARequest("a", 3, str(root / "one"))) == expected["one"]
    with pytest.raises(AdapterConflictError, match="load_inplace"):
        answer(llm, LoRARequest("b", 3, str(root / "two")))
    assert answer(llm, LoRARequest("b", 3, str(root / "two"), load_inplace=True)) == expected["two"]
    assert answer(llm, LoRARequest("b", 3, str(root / "two"))) == expected["two"]


def test_unchanged_files_are_not_read_again(
    llm: LLM, policy: Path, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = LoRARequest("policy", 4, str(policy))
    assert answer(llm, request) == expected["one"]
    engine = llm.llm_engine.engine
    monkeypatch.setattr(engine, "read_adapter", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(adapter_tokenizers, "read_text_files", lambda _: pytest.fail("read again"))
    assert answer(llm, request) == expected["one"]
    outputs = llm.generate(["the fox"] * 20, GREEDY, lora_request=request, use_tqdm=False)
    assert all(output.outputs[0].token_ids == expected["one"] for output in outputs)


def test_what_was_read_serves_after_its_directory_is_gone(
    llm: LLM, policy: Path, expected: dict[str, list[int]]
) -> None:
    (policy / "chat_template.jinja").write_text("[{{ messages[0]['content'] }}]")
    request, messages = LoRARequest("policy", 5, str(policy)), [{"role": "user", "content": "hi"}]
    (before,) = llm.chat(messages, GREEDY, lora_request=request, use_tqdm=False)
    shutil.rmtree(policy)
    (after,) = llm.chat(messages, GREEDY, lora_request=request, use_tqdm=False)
    assert after.prompt_token_ids == before.prompt_token_ids
    assert after.outputs[0].token_ids == before.outputs[0].token_ids
    assert answer(llm, request) == expected["one"]


def test_a_template_that_changes_counts_from_the_next_call_on(llm: LLM, policy: Path) -> None:
    request, messages = LoRARequest("policy", 6, str(policy)), [{"role": "user", "content": "hi"}]
    for template, prompt in (("A{{ messages[0]['content'] }}", "Ahi"), ("B{{ messages[0]['content'] }}", "Bhi")):
        (policy / "chat_template.jinja").write_text(template)
        (output,) = llm.chat(messages, GREEDY, lora_request=request, use_tqdm=False)
        assert output.prompt_token_ids == llm.get_tokenizer().encode(prompt, add_special_tokens=False)


def test_files_that_became_unreadable_are_an_error_and_the_id_mends(
    llm: LLM, root: Path, policy: Path, expected: dict[str, list[int]]
) -> None:
    request = LoRARequest("policy", 7, str(policy))
    assert answer(llm, request) == expected["one"]
    (policy / "adapter_model.safetensors").write_bytes(b"half a file")
    with pytest.raises(AdapterRefusedError):
        answer(llm, request)
    overwrite(policy, root / "two")
    assert answer(llm, request) == expected["two"]


def test_all_prompts_of_a_call_have_the_same_weights(
    llm: LLM, root: Path, policy: Path, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = LoRARequest("policy", 8, str(policy), load_inplace=True)
    engine, add = llm.llm_engine, llm.llm_engine.add_request
    num_added = 0

    def add_and_change(*arguments: object, **keywords: object) -> None:
        nonlocal num_added
        add(*arguments, **keywords)  # type: ignore[arg-type]
        num_added += 1
        overwrite(policy, root / NAMES[num_added % 2])

    monkeypatch.setattr(engine, "add_request", add_and_change)
    outputs = llm.generate(["the fox"] * 4, GREEDY, lora_request=request, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == [expected["one"]] * 4


def test_requests_that_run_keep_the_weights_that_they_began_with(
    llm: LLM, root: Path, policy: Path, expected: dict[str, list[int]]
) -> None:
    engine, request = llm.llm_engine, LoRARequest("policy", 9, str(policy))
    engine.add_request("old", "the fox", GREEDY, request)
    outputs: dict[str, list[int]] = {}
    while not engine.step():
        pass
    overwrite(policy, root / "two")
    engine.add_request("new", "the fox", GREEDY, request)
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
    assert outputs == {"old": expected["one"], "new": expected["two"]}


def test_adding_takes_what_the_files_are_now_and_a_pin_stays_with_the_id(
    llm: LLM, root: Path, policy: Path, expected: dict[str, list[int]]
) -> None:
    engine, request = llm.llm_engine, LoRARequest("policy", 10, str(policy))
    engine.add_lora(request)
    assert engine.pin_lora(10) and not engine.pin_lora(11)
    overwrite(policy, root / "two")
    engine.add_lora(request)
    assert answer(llm, request) == expected["two"]
    pinned = engine.engine._adapters._pinned
    assert len(pinned) == 1, "in place of the old one, where one alone may be pinned"
    assert engine.remove_lora(10)
    assert not engine.engine._adapters._pinned
