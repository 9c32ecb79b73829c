"""Adapters with embeddings, heads, norms and tokens of their own, against peft in float32: several of them, plain ones and
the base model in one batch."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from tiny import run_engine
from transformers import PreTrainedModel

from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.engine.request import GenerateRequest, SamplingOptions

V = 131
PROMPT = [*range(7, 30), 5, 9]
GREEDY = SamplingOptions(max_tokens=8, temperature=0.0, num_logprobs=10, ignore_eos=True)
BOTH = ["embed_tokens", "lm_head"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning"),  # of biases of B
]

# Options of make_adapter; "added": the vocabulary is resized by so many tokens.
Options = dict[str, Any]
ADAPTERS: dict[str, Options] = {
    "plain": {},
    "LoRA on the embedding": {"targets": ["q_proj", "embed_tokens"]},
    "LoRA on the head": {"targets": ["v_proj", "lm_head"], "alpha_pattern": {"lm_head": 3}, "rank_pattern": {"lm_head": 7}},
    "LoRA on both, saved alone": {"targets": ["q_proj", *BOTH], "use_rslora": True, "save_embedding_layers": False},
    "DoRA on both": {"targets": ["q_proj", *BOTH], "use_dora": True},
    "bias of the head's B": {"targets": ["q_proj", "lm_head"], "lora_bias": True},
    "own embedding": {"modules_to_save": ["embed_tokens"]},
    "own head": {"modules_to_save": ["lm_head"]},
    "own embedding and head": {"modules_to_save": BOTH},
    "own embedding, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "LoRA on the embedding, tied": {"targets": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
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
            table.weight.data[V:].normal_(0.0, 0.3)
    return tiny.make_adapter(model, directory, seed=seed, **{"targets": ["q_proj", "down_proj"]} | options)


def load(name: str, directory: Path) -> PreTrainedModel:
    """The base model as loaded from its files: what peft looks at to see whether the vocabulary was resized."""
    model = tiny.make_model(name, directory)
    return type(model).from_pretrained(directory)


def serve(directory: Path, adapters: dict[str, Path], **options: Any) -> Engine:
    lora = LoRAConfig(max_loras=max(1, len(adapters)), full_weight_bytes=64 << 20)
    fields: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 32, "max_num_batched_tokens": 96, "lora": lora}
    engine = Engine.from_config(EngineConfig(model=str(directory), **fields | options))
    engine.load()
    return engine


def prompt_of(added: int, number: int) -> list[int]:
    """Of different lengths, and with what tokens the adapter adds."""
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
        run_engine(engine, requests)  # brings all into slots
        results = run_engine(engine, requests)
        engine.check_integrity()
    finally:
        engine.close()
    tiny.assert_agrees(results["base"], base, PROMPT)
    wrong = []
    for request in requests[1:]:
        try:
            tiny.assert_agrees(results[request.request_id], references[request.request_id], list(request.prompt_token_ids))
        except AssertionError as error:
            wrong.append((request.request_id, str(error)[:200]))
    assert not wrong
