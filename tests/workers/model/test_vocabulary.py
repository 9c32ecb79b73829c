"""Adapters with their own embeddings, heads, norms and tokens, against peft in float32, in one batch with plain ones
and the base model."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import run_engine
from transformers import PreTrainedModel

from lorafleet.kernels import native
from lorafleet.workers.adapters.format import HostAdapter, load_adapter
from lorafleet.workers.adapters.vocabulary import NEW_EMBEDDINGS_FILE
from lorafleet.workers.adapters.weights_file import WEIGHTS_FILE
from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.errors import AdapterRefusedError, InvalidRequestError
from lorafleet.workers.model import decoder
from lorafleet.workers.model.kv_cache import KVCache
from lorafleet.workers.model.step_input import StepInput
from lorafleet.workers.scheduling.request import FinishReason, GenerateRequest
from lorafleet.workers.scheduling.sampling_options import SamplingOptions

V = 131
PROMPT = [*range(7, 30), 5, 9]
GREEDY = SamplingOptions(max_tokens=8, temperature=0.0, logprobs=10, ignore_eos=True)
BOTH = ["embed_tokens", "lm_head"]
PATHS = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning"),
    pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning"),  # of biases of B
]

# Options of make_adapter; "added": the vocabulary is resized by this many tokens.
Options = dict[str, Any]
ADAPTERS: dict[str, Options] = {
    "plain": {},
    "LoRA on the embedding": {"targets": ["q_proj", "embed_tokens"]},
    "LoRA on the head": {
        "targets": ["v_proj", "lm_head"],
        "alpha_pattern": {"lm_head": 3},
        "rank_pattern": {"lm_head": 7},
    },
    "LoRA on both, saved alone": {"targets": ["q_proj", *BOTH], "use_rslora": True, "save_embedding_layers": False},
    "DoRA on both": {"targets": ["q_proj", *BOTH], "use_dora": True},
    "bias of the head's B": {"targets": ["q_proj", "lm_head"], "lora_bias": True},
    "own embedding": {"modules_to_save": ["embed_tokens"]},
    "own head": {"modules_to_save": ["lm_head"]},
    "own embedding and head": {"modules_to_save": BOTH},
    "own embedding, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "LoRA on the embedding, tied": {"targets": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "own head, tied": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "LoRA on the head, tied": {"targets": ["q_proj", "lm_head"], "ensure_weight_tying": True},
    "added tokens, own embedding, tied": {
        "added": 3,
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "trained tokens, tied": {"trainable_token_indices": [4, 8], "ensure_weight_tying": True},
    "own norms": {"modules_to_save": ["input_layernorm", "post_attention_layernorm"]},
    "own norms by their end": {"modules_to_save": ["norm"]},
    "two norms and a head": {"modules_to_save": ["model.norm", "layers.1.input_layernorm", "lm_head"]},
    "trained tokens": {"trainable_token_indices": [9, 3, 20]},
    "trained tokens of each": {"trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [50, 4, 60]}},
    "trained tokens of both": {"trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [3, 9]}},
    "trained tokens of the head": {"trainable_token_indices": {"lm_head": [4, 60]}},
    "trained tokens, LoRA on the head": {"targets": ["q_proj", "lm_head"], "trainable_token_indices": [3, 9]},
    "added tokens": {"added": 3},
    "added tokens, own embedding and head": {"added": 5, "modules_to_save": BOTH},
    "added tokens, own embedding": {"added": 2, "modules_to_save": ["embed_tokens"]},
    "added tokens, LoRA on both": {"added": 4, "targets": ["q_proj", *BOTH]},
    "added tokens, trained": {"added": 3, "trainable_token_indices": [V, 9, V + 2, V + 1]},
    "added tokens, DoRA on both": {"added": 1, "targets": ["q_proj", *BOTH], "use_dora": True},
}


def make(base: PreTrainedModel, directory: Path, options: Options, seed: int) -> PeftModel:
    options = copy.deepcopy(options)
    model = type(base).from_pretrained(base.name_or_path)
    added = options.pop("added", 0)
    if added:
        torch.manual_seed(seed)
        model.resize_token_embeddings(V + added, mean_resizing=False)
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            assert isinstance(table.weight, torch.nn.Parameter)
            table.weight.data[V:].normal_(0.0, 0.3)
    options.setdefault("targets", ["q_proj", "down_proj"])
    return tiny.make_adapter(model, directory, seed=seed, **options)


def load(name: str, directory: Path) -> PreTrainedModel:
    """Load the base model from its files: peft checks them for a resized vocabulary."""
    model = tiny.make_model(name, directory)
    return type(model).from_pretrained(directory)


def serve(directory: Path, adapters: dict[str, Path], **options: Any) -> Engine:
    lora = LoRAConfig(max_loras=max(1, len(adapters)), lora_full_weight_bytes=64 << 20)
    fields: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 32, "max_num_batched_tokens": 96, "lora": lora}
    engine = Engine.from_config(EngineConfig(model=str(directory), **fields | options))
    engine.load()
    return engine


def prompt_of(added: int, number: int) -> list[int]:
    """Prompts of different lengths, with the tokens that the adapter adds."""
    return [*PROMPT[number % 5 :], *range(V, V + added)]


@pytest.mark.parametrize("name", ["llama2", "smollm2", "qwen3"])
def test_adapters_with_tables_and_norms_of_their_own_are_applied_as_by_peft_in_one_batch(
    name: str, tmp_path: Path
) -> None:
    base = load(name, tmp_path / "model")
    references: dict[str, PeftModel] = {}
    for number, (case, options) in enumerate(ADAPTERS.items()):
        if "tied" in case and not base.config.tie_word_embeddings:
            continue
        references[case] = make(base, tmp_path / case, options, seed=number)
    engine = serve(tmp_path / "model", {case: tmp_path / case for case in references})
    try:
        requests = [GenerateRequest("base", tuple(PROMPT), GREEDY)]
        for number, case in enumerate(references):
            spec = engine.register_adapter(str(tmp_path / case))
            added = ADAPTERS[case].get("added", 0)
            assert spec.vocab_size == V + added
            requests.append(GenerateRequest(case, tuple(prompt_of(added, number)), GREEDY, spec.digest))
        run_engine(engine, requests)  # loads all into slots
        results = run_engine(engine, requests)
        engine.check_integrity()
    finally:
        engine.close()
    tiny.assert_agrees(results["base"], base, PROMPT)
    wrong = []
    for request in requests[1:]:
        try:
            tiny.assert_agrees(
                results[request.request_id], references[request.request_id], list(request.prompt_token_ids)
            )
        except AssertionError as error:
            wrong.append((request.request_id, str(error)[:200]))
    assert not wrong


SOME = ["plain", "own embedding and head", "two norms and a head", "trained tokens", "added tokens, LoRA on both"]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel, dict[str, PeftModel]]:
    """(directory, base model, reference of each adapter); the files lie in the directory under the adapters' names."""
    directory = tmp_path_factory.mktemp("fleet")
    base = load("smollm2", directory / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        references = {case: make(base, directory / case, ADAPTERS[case], seed=n) for n, case in enumerate(SOME)}
    return directory, base, references


Fleet = tuple[Path, PreTrainedModel, dict[str, PeftModel]]


def batch(
    engine: Engine, directory: Path, cases: list[str], options: SamplingOptions = GREEDY
) -> list[GenerateRequest]:
    digests = {case: engine.register_adapter(str(directory / case)).digest for case in cases}
    requests = [GenerateRequest("base", tuple(PROMPT), options)]
    for number, case in enumerate(cases):
        prompt = prompt_of(ADAPTERS[case].get("added", 0), number)
        requests.append(GenerateRequest(case, tuple(prompt), options, digests[case]))
    return requests


def test_the_pool_holds_what_it_may_and_adapters_take_turns_in_it(fleet: Fleet) -> None:
    directory, base, references = fleet
    matrix = V * 48 * 4
    lora = LoRAConfig(max_loras=3, lora_full_weight_bytes=3 * matrix)  # of the own tables only one adapter's at a time
    engine = serve(directory / "model", {}, lora=lora, max_num_batched_tokens=32)
    try:
        requests = batch(engine, directory, SOME)
        sizes = {request.adapter: engine._full_weight_bytes(request.adapter) for request in requests if request.adapter}
        assert sum(sizes.values()) > 3 * matrix
        for request in requests:
            engine.submit(request)
        results = {request.request_id: tiny.Result() for request in requests}
        while engine.has_unfinished():
            engine.wait_for_work(timeout_s=1.0)
            tiny.gather(engine.step(), results)
            engine.check_integrity()
            assert engine._runner.table_bytes() <= 3 * matrix + 64, "and the numbers of some LoRA"
        planned = sum(sizes[digest] for digest in engine.stats().device_adapters)
        padding = 3 * 15 * 48 * 4  # of heads, absent in float32
        assert planned - padding <= engine._runner.table_bytes() <= planned + 64, "each takes what was planned for it"
    finally:
        engine.close()
    tiny.assert_agrees(results["base"], base, PROMPT)
    for request in requests[1:]:
        prompt = list(request.prompt_token_ids)
        tiny.assert_agrees(results[request.request_id], references[request.request_id], prompt)


def test_a_step_without_own_tables_or_norms_is_what_it_was_though_such_adapters_sit_in_slots(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits are equal, and no row is checked."""
    directory, _, _ = fleet
    plain = ["plain"]
    alone = serve(directory / "model", {}, dtype="bfloat16", lora=LoRAConfig(max_loras=5))
    try:
        expected = run_engine(alone, batch(alone, directory, plain))
    finally:
        alone.close()
    engine = serve(
        directory / "model", {}, dtype="bfloat16", lora=LoRAConfig(max_loras=5, lora_full_weight_bytes=8 << 20)
    )
    try:
        run_engine(engine, batch(engine, directory, SOME))
        steps = []
        forward = engine._runner._decoder.forward

        def noted(step: StepInput, cache: KVCache, **options: Any) -> torch.Tensor:
            steps.append(step)
            return forward(step, cache, **options)

        monkeypatch.setattr(engine._runner._decoder, "forward", noted)
        assert run_engine(engine, batch(engine, directory, plain)) == expected
        assert steps and all(step.which_norm_T is None and not step.own_tables for step in steps)
    finally:
        engine.close()


def test_replayed_steps_with_own_norms_and_tables_give_the_same_bits(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _, _ = fleet

    def run() -> list[dict[str, tiny.Result]]:
        lora = LoRAConfig(max_loras=5, lora_full_weight_bytes=8 << 20)
        engine = serve(directory / "model", {}, dtype="bfloat16", device="cpu", lora=lora)
        try:
            mixed, plain = batch(engine, directory, SOME), batch(engine, directory, ["plain", "trained tokens"])
            run_engine(engine, mixed)
            # Steps of the same shapes with and without a row that has its own norms.
            return [run_engine(engine, requests) for requests in (mixed, plain, mixed, mixed[2:4], plain)]
        finally:
            engine.close()

    replay = native.Recording.run
    ran: list[native.Recording] = []

    def noted(recording: native.Recording) -> None:
        ran.append(recording)
        replay(recording)

    monkeypatch.setattr(native.Recording, "run", noted)
    kept = run()
    assert len(ran) - len({id(recording) for recording in ran}) > 10
    monkeypatch.setattr(decoder, "_MAX_KEPT_TOKENS", 0)
    assert run() == kept


@pytest.mark.parametrize(("quantization", "tolerance"), [(None, 0.1), ("int8", 0.2)])
def test_own_tables_and_norms_work_in_16_bits_and_over_integers(
    quantization: str | None, tolerance: float, fleet: Fleet
) -> None:
    directory, base, references = fleet
    lora = LoRAConfig(max_loras=5, lora_full_weight_bytes=8 << 20)
    engine = serve(directory / "model", {}, dtype="bfloat16", quantization=quantization, lora=lora)
    try:
        requests = batch(engine, directory, SOME)
        results = run_engine(engine, requests)
    finally:
        engine.close()
    for request in requests:
        reference = references.get(request.request_id, base)
        result, prompt = results[request.request_id], list(request.prompt_token_ids)
        with torch.no_grad():
            rows = reference(torch.tensor([prompt + result.token_ids])).logits[0].log_softmax(dim=-1)
        for i, logprobs in enumerate(result.logprobs):
            expected = rows[len(prompt) - 1 + i][list(logprobs.top_ids)]
            torch.testing.assert_close(torch.tensor(logprobs.top_logprobs), expected, atol=tolerance, rtol=0)


def test_ids_that_an_adapter_adds_are_its_own(tmp_path: Path) -> None:
    """Other adapters' prompts, stops and answers never have them; sampling, penalties and stops work with them."""
    base = load("llama2", tmp_path / "model")
    reference = make(base, tmp_path / "wide", {"added": 40, "modules_to_save": BOTH}, seed=1)
    make(base, tmp_path / "narrow", {"added": 1}, seed=2)
    engine = serve(tmp_path / "model", {"wide": tmp_path, "narrow": tmp_path})
    try:
        wide, narrow = (engine.register_adapter(str(tmp_path / name)) for name in ("wide", "narrow"))
        assert (wide.vocab_size, narrow.vocab_size, engine.vocab_size) == (V + 40, V + 1, V)
        for adapter, too_large in ((None, V), (narrow.digest, V + 1), (wide.digest, V + 40)):
            for prompt, stops in (((5, too_large), ()), ((5,), (too_large,))):
                sampling = SamplingOptions(max_tokens=2, stop_token_ids=frozenset(stops))
                with pytest.raises(InvalidRequestError, match=f"ids go from 0 to {too_large - 1}"):
                    engine.submit(GenerateRequest("refused", prompt, sampling, adapter))
        hot = SamplingOptions(max_tokens=60, temperature=5.0, logprobs=20, ignore_eos=True)
        requests = []
        for seed in range(4):
            for name, adapter in (("base", None), ("narrow", narrow.digest), ("wide", wide.digest)):
                sampling = dataclasses.replace(hot, seed=seed, repetition_penalty=1.2, presence_penalty=0.5)
                requests.append(GenerateRequest(f"{name}{seed}", (5, 6, 7), sampling, adapter))
        results = run_engine(engine, requests)
        seen = {name: set[int]() for name in ("base", "narrow", "wide")}
        for request in requests:
            result = results[request.request_id]
            assert result.error is None
            for logprobs in result.logprobs:
                assert all(map(math.isfinite, logprobs.top_logprobs))
                seen[request.request_id[:-1]].update(logprobs.top_ids)
            seen[request.request_id[:-1]].update(result.token_ids)
        assert max(seen["base"]) < V and max(seen["narrow"]) == V and len([i for i in seen["wide"] if i >= V]) > 20
        # The reference's answer up to its first added id, which is a stop token.
        prompts = ([first, 6, V + 3, 9, V + 39] for first in range(3, V))
        answers = ((prompt, tiny.greedy(reference, prompt, 24)) for prompt in prompts)
        asked, answer = next((prompt, answer) for prompt, answer in answers if max(answer) >= V)
        stop = next(token_id for token_id in answer if token_id >= V)
        sampling = SamplingOptions(max_tokens=24, temperature=0.0, stop_token_ids=frozenset([stop]))
        stopped = GenerateRequest("stopped", tuple(asked), sampling, wide.digest)
        held = GenerateRequest("held", tuple(asked), dataclasses.replace(sampling, min_tokens=24), wide.digest)
        results = run_engine(engine, [stopped, held, GenerateRequest("base", (5, 6), hot)])
        assert results["stopped"].token_ids == answer[: answer.index(stop) + 1]
        assert results["stopped"].finish is FinishReason.STOP
        assert len(results["held"].token_ids) == 24 and stop not in results["held"].token_ids
    finally:
        engine.close()


@pytest.mark.parametrize(("name", "keys"), [("llama2", BOTH), ("smollm2", BOTH), ("smollm2", ["embed_tokens"])])
def test_new_embeddings_are_rows_behind_the_vocabulary(name: str, keys: list[str], tmp_path: Path) -> None:
    """Files of S-LoRA and vLLM next to an adapter; if the base ties its tables, the embedding's rows are the head's."""
    base = load(name, tmp_path / "model")
    reference = make(base, tmp_path / "adapter", {"added": 3}, seed=1)
    file = tmp_path / "adapter" / WEIGHTS_FILE
    weights = load_file(file)
    tables = {module: weights.pop(f"base_model.model.{path}.weight") for module, path in PATHS.items()}
    save_file(weights, file)
    names = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}
    save_file(
        {names[module]: tables[module][V:].clone() for module in keys}, tmp_path / "adapter" / NEW_EMBEDDINGS_FILE
    )
    engine = serve(tmp_path / "model", {"adapter": tmp_path})
    try:
        spec = engine.register_adapter(str(tmp_path / "adapter"))
        prompt = prompt_of(3, 0)
        requests = [
            GenerateRequest("b", tuple(PROMPT), GREEDY),
            GenerateRequest("a", tuple(prompt), GREEDY, spec.digest),
        ]
        results = run_engine(engine, requests)
    finally:
        engine.close()
    tiny.assert_agrees(results["a"], reference, prompt)
    tiny.assert_agrees(results["b"], base, PROMPT)


@pytest.mark.parametrize("name", ["llama2", "smollm2"])
@pytest.mark.parametrize(
    "case", ["LoRA on the head", "LoRA on the embedding", "added tokens", "added tokens, LoRA on both"]
)
def test_a_table_that_is_saved_as_the_base_has_it_takes_no_memory(name: str, case: str, tmp_path: Path) -> None:
    """PEFT saves whole tables with LoRA on them, or after resizing; untrained tables equal the base's."""
    base = load(name, tmp_path / "model")
    make(base, tmp_path / case, ADAPTERS[case], seed=1)
    file = tmp_path / case / WEIGHTS_FILE
    engine = serve(tmp_path / "model", {case: tmp_path})
    try:
        spec = engine.register_adapter(str(tmp_path / case))
        assert all(table.weight is None for table in spec.vocabulary.tables.values())
        adapter = load_adapter(spec, engine.spec.base_shapes, torch.float32)
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held(adapter)}
        assert sum(storages.values()) <= adapter.num_bytes
        weights = load_file(file)
        if case.startswith("LoRA"):
            save_file({key: value for key, value in weights.items() if "base_layer" not in key}, file)
            assert engine.register_adapter(str(tmp_path / case)).digest == spec.digest, "nothing was lost"
        for other in weights:  # the same table if the base ties them
            if other.endswith(("base_layer.weight", "lm_head.weight", "embed_tokens.weight")):
                weights[other][3, 3] += 1.0
        save_file(weights, file)
        changed = engine.register_adapter(str(tmp_path / case))
        assert changed.digest != spec.digest and any(table.weight for table in changed.vocabulary.tables.values())
    finally:
        engine.close()


def held(adapter: HostAdapter) -> list[torch.Tensor]:
    """All tensors of matrices."""
    changes = [*adapter.weights.values(), *(table.lora for table in adapter.tables.values() if table.lora)]
    tables = [table.weight_VH for table in adapter.tables.values() if table.weight_VH is not None]
    rows = [rows for table in adapter.tables.values() for _, rows in table.rows]
    return [matrix for change in changes for matrix in (change.a_RI, change.b_RO)] + tables + rows


def test_an_adapter_larger_than_the_pool_is_refused_with_the_flag(fleet: Fleet) -> None:
    directory, _, _ = fleet
    engine = serve(directory / "model", {}, lora=LoRAConfig(lora_full_weight_bytes=V * 48 * 4))
    try:
        with pytest.raises(AdapterRefusedError, match="--lora-full-weight-bytes") as caught:
            engine.register_adapter(str(directory / "own embedding and head"))
        assert caught.value.reason == "larger_than_full_weight_pool"
        engine.register_adapter(str(directory / "trained tokens"))
    finally:
        engine.close()


def test_more_added_ids_than_are_allowed_are_refused_with_the_flag(fleet: Fleet) -> None:
    directory, _, _ = fleet
    engine = serve(directory / "model", {}, lora=LoRAConfig(lora_extra_vocab_size=3, lora_full_weight_bytes=8 << 20))
    try:
        with pytest.raises(AdapterRefusedError, match="--lora-extra-vocab-size 4") as caught:
            engine.register_adapter(str(directory / "added tokens, LoRA on both"))
        assert caught.value.reason == "vocab_too_large"
    finally:
        engine.close()
