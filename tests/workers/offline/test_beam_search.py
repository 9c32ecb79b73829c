"""Beam search of the offline API: transformers' and peft's sequences."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny

from lorafleet.workers import LLM, BeamSearchParams, LoRARequest
from lorafleet.workers.errors import InvalidRequestError


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
            assert [sequence.tokens[len(ids) :] for sequence in output.sequences] == tiny.beams(
                model, ids, 3, 6, eos_token_id=None
            )
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
