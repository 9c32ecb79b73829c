"""Beam search of the offline API: transformers' and peft's sequences."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from lorafleet.workers import LLM, BeamSearchParams, LoRARequest
from lorafleet.workers.errors import InvalidRequestError


def searched(model: Any, prompt: list[int], width: int, max_tokens: int) -> list[list[int]]:
    with torch.no_grad():
        found = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=max_tokens,
            num_beams=width,
            num_return_sequences=width,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return list(found.tolist())


def test_beams_are_those_of_transformers_and_peft(tmp_path: Path) -> None:
    base = tiny.make_model("smollm2", tmp_path / "model")
    tiny.save_tokenizer(tmp_path / "model")
    adapted = tiny.make_adapter(copy.deepcopy(base), tmp_path / "sql", strength=0.2)
    params = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True)
    lora = LoRARequest("sql", 1, str(tmp_path / "sql"))
    with LLM(model=str(tmp_path / "model"), enable_lora=True, dtype="float32") as llm:
        ids = llm.get_tokenizer().encode("the quick fox")
        plain, with_adapter = llm.beam_search(["the quick fox", ids], params, lora_request=[None, lora])
        for output, model in ((plain, base), (with_adapter, adapted)):
            assert [sequence.tokens for sequence in output.sequences] == searched(model, ids, 3, 6)
            for sequence in output.sequences:
                assert sequence.text == llm.get_tokenizer().decode(sequence.tokens)
                assert sequence.finish_reason == "length" and len(sequence.logprobs) == 6
                own = [
                    position[token_id].logprob
                    for position, token_id in zip(sequence.logprobs, sequence.tokens[len(ids) :], strict=True)
                ]
                assert sequence.cum_logprob == pytest.approx(sum(own))
        assert with_adapter.sequences[0].lora_request == lora
        assert len(llm.beam_search("the", BeamSearchParams(beam_width=2, max_tokens=3))[0].sequences) == 2
        with pytest.raises(InvalidRequestError, match="lora_request has 1 entries"):
            llm.beam_search(["a", "b"], params, lora_request=[None])
