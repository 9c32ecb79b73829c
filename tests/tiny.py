"""Tiny random models and adapters of transformers and peft: the live reference of the correctness tests."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.errors import LoRAFleetError
from lorafleet.workers.scheduling.logprobs import TokenLogprobs
from lorafleet.workers.scheduling.request import FinishReason, GenerateRequest, RequestEvent

TOLERANCE = 1e-4  # of log-probabilities, in float32
ALL_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

_SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "pad_token_id": 0,
}

ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama2": LlamaConfig(**_SIZES | {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama3": LlamaConfig(
        **_SIZES | {"tie_word_embeddings": False},
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama-biased": LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True),
    "smollm2": LlamaConfig(**_SIZES | {"tie_word_embeddings": True}),
    "mistral-sliding": MistralConfig(**_SIZES | {"head_dim": 16}, sliding_window=12),
    "qwen2": Qwen2Config(**_SIZES | {"tie_word_embeddings": True}),
    "qwen2-sliding": Qwen2Config(**_SIZES, use_sliding_window=True, sliding_window=10, max_window_layers=1),
    "qwen3": Qwen3Config(**_SIZES | {"head_dim": 32}),
}


def make_model(name: str, directory: Path, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a random float32 model of an architecture, saved into `directory`. changes: of its config."""
    torch.manual_seed(seed)
    config = copy.deepcopy(ARCHITECTURES[name])
    config.update(changes)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter_name, parameter in model.named_parameters():
        # Biases and norm weights start as zeros and ones, which would hide errors in reading them.
        if parameter.dim() == 1:
            parameter.data.normal_(1.0 if "norm" in parameter_name else 0.0, 0.2)
        else:
            parameter.data.normal_(0.0, 0.08)
    model.eval().save_pretrained(directory)
    return model


def make_adapter(
    model: PreTrainedModel,
    directory: Path,
    *,
    rank: int = 4,
    targets: list[str] | None = None,
    seed: int = 1,
    strength: float = 0.1,
    name: str = "default",
    save_embedding_layers: bool | str = "auto",
    **options: Any,
) -> PeftModel:
    """Save a random PEFT adapter with non-zero B into `directory`. Return the PEFT model for reference outputs.

    options: further fields of LoraConfig. Everything they train is random too.

    Wraps (and changes) the given model: give it a fresh copy, or call `unload` on the result.
    """
    torch.manual_seed(seed)
    fields: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank, "target_modules": targets or ALL_TARGETS}
    fields |= options
    config = LoraConfig(task_type="CAUSAL_LM", **fields)
    peft_model = get_peft_model(model, config, adapter_name=name)
    for parameter_name, parameter in peft_model.named_parameters():
        if "magnitude" in parameter_name:
            parameter.data.mul_(torch.empty_like(parameter).uniform_(0.7, 1.3))
        elif parameter.requires_grad and "norm.modules_to_save" in parameter_name:
            parameter.data.normal_(1.0, 3 * strength)
        elif parameter.requires_grad:  # LoRA's, biases that are trained, embeddings and heads
            parameter.data.normal_(0.0, strength)
    peft_model.eval().save_pretrained(str(directory), save_embedding_layers=save_embedding_layers)
    return peft_model


def make_adapters(model: PreTrainedModel, directory: Path, names: Iterable[str], **options: Any) -> dict[str, Path]:
    """Make adapters of one base, each with other weights. Return their directories by name.

    options: see `make_adapter`.
    """
    directories = {name: directory / name for name in names}
    for seed, adapter in enumerate(directories.values(), start=1):
        make_adapter(copy.deepcopy(model), adapter, seed=seed, **options)
    return directories


def fuse(adapted: PeftModel, adapter: Path, fused: str, parts: list[str]) -> None:
    """Let the parts share the first one's A, and save them as one module, as for a base model with fused parts."""
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    layers = {name.split(f".{parts[0]}.")[0] for name in weights if f".{parts[0]}." in name}
    for layer in layers:
        own = [{side: weights.pop(f"{layer}.{part}.lora_{side}.weight") for side in "AB"} for part in parts]
        weights[f"{layer}.{fused}.lora_A.weight"] = own[0]["A"]
        weights[f"{layer}.{fused}.lora_B.weight"] = torch.cat([sides["B"] for sides in own])
        for part in parts[1:]:
            adapted.get_parameter(f"{layer}.{part}.lora_A.default.weight").data = own[0]["A"].clone()
    save_file(weights, file)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = [*(target for target in config["target_modules"] if target not in parts), fused]
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def save_config(name: str, directory: Path, change: dict[str, object]) -> None:
    """Write a config.json of an architecture with some fields changed."""
    ARCHITECTURES[name].save_pretrained(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {"architectures": ["LlamaForCausalLM"]} | change
    path.write_text(json.dumps(config))


def drop_tensor(directory: Path, name: str) -> None:
    """Rewrite a saved model without one of its tensors."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)


def greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """Return the reference's greedy continuation, ignoring EOS."""
    with torch.no_grad():
        output = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return list(output[0, len(prompt) :].tolist())


def beams(model: Any, prompt: list[int], width: int, max_tokens: int, **options: Any) -> list[list[int]]:
    """Return the continuations that the reference's beam search finds, best first, padded. options: of `generate`."""
    with torch.no_grad():
        found = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=max_tokens,
            num_beams=width,
            num_return_sequences=width,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
    return list(found[:, len(prompt) :].tolist())


@dataclass
class Result:
    """All events of one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # from the second token on
    finish: FinishReason | None = None
    error: LoRAFleetError | None = None


def run_engine(engine: Engine, requests: list[GenerateRequest], timeout_s: float = 60.0) -> dict[str, Result]:
    """Submit all at once, step until all have ended; asserts one terminal event each."""
    for request in requests:
        engine.submit(request)
    results = {request.request_id: Result() for request in requests}
    deadline = time.monotonic() + timeout_s
    while engine.has_unfinished():
        assert time.monotonic() < deadline, "not done in time"
        engine.wait_for_work(timeout_s=1.0)
        gather(engine.step(), results)
    assert all(result.finish is not None for result in results.values())
    return results


def gather(events: list[RequestEvent], results: dict[str, Result]) -> None:
    for event in events:
        result = results[event.request_id]
        assert result.finish is None, "an event after the terminal one"
        if event.token_id is not None:
            result.token_ids.append(event.token_id)
        if event.prompt_logprobs is not None:
            assert not result.token_ids, "after an output token"
            result.prompt_logprobs.extend(event.prompt_logprobs)
        if event.logprobs is not None:
            result.logprobs.append(event.logprobs)
        result.finish, result.error = event.finish, event.error


def assert_agrees(result: Result, reference: Any, prompt: list[int]) -> None:
    """Check that a greedy answer with log-probabilities, computed in float32, is the reference's."""
    assert result.token_ids == greedy(reference, prompt, len(result.token_ids))
    with torch.no_grad():
        expected = reference(torch.tensor([prompt + result.token_ids])).logits[0].log_softmax(dim=-1)
    assert len(result.logprobs) == len(result.token_ids)
    for i, logprobs in enumerate(result.logprobs):
        row = expected[len(prompt) - 1 + i]
        torch.testing.assert_close(logprobs.logprob, row[result.token_ids[i]].item(), atol=TOLERANCE, rtol=0)
        ours = torch.tensor(logprobs.top_logprobs)
        torch.testing.assert_close(ours, row[list(logprobs.top_ids)], atol=TOLERANCE, rtol=0)
        assert set(logprobs.top_ids) == set(row.topk(len(logprobs.top_ids)).indices.tolist())


CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_tokenizer(directory: Path, vocab_size: int = 131) -> None:
    """Save a byte-level BPE tokenizer with a chat template for the tiny models. Ids 0, 1, 2: pad, EOS, BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ascii_alphabet = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=ascii_alphabet,
        limit_alphabet=len(ascii_alphabet),
        show_progress=False,
    )
    corpus = ["the quick brown fox jumps over the lazy dog and then the other thing in the end"] * 3
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "pad_token": "<pad>",
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
