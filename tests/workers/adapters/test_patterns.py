"""Patterns match the modules that PEFT's match, and one that would never end is stopped."""

from __future__ import annotations

import time

import pytest
from peft.utils.other import get_pattern_key

from lorafleet.workers.adapters import patterns as patterns_module
from lorafleet.workers.adapters.modules import BaseShapes
from lorafleet.workers.adapters.patterns import MAX_CHARS, MAX_PATTERNS, PatternError, first_matches

SHAPES = {"q_proj": (8, 8), "k_proj": (8, 4), "v_proj": (8, 4), "o_proj": (8, 8), "down_proj": (12, 8)}
MODULES = BaseShapes(num_layers=12, linears=SHAPES, hidden_size=8, vocab_size=16).module_names()


def test_the_modules_of_a_base_model_are_its_linears_fused_ones_and_tables() -> None:
    assert MODULES[:6] == [
        f"model.layers.0.{name}"
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    ] + ["model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.down_proj"]
    assert MODULES[-2:] == ["model.embed_tokens", "lm_head"]


@pytest.mark.parametrize(
    "patterns",
    [
        ["q_proj"],
        ["proj", "_proj", "layers.1", "self.attn.q_proj", "lm_head", "embed_tokens", "head"],
        ["model.layers.1.self_attn.q_proj", "layers.1.self_attn.q_proj", "q_proj", "down_proj"],
        [r"^model.layers.3.*", "q_proj", r".*down_proj"],
        [r"layers\.(1|11)\.self_attn\.[qv]_proj", r"1\.mlp\.\w+", r"layers\.\d+\.mlp\..*"],
        [r".*\.(?!q)\w_proj", "q_proj"],
        ["a)|(model.layers.2.*", "lm_head"],
        ["", "q_proj$", r"\d\d\.mlp\.down_proj", r"(?P<x>q)_proj"],
        [r"model.layers.1\d.self_attn.q_proj", "lm_he.d"],
        ["qkv_proj"],
    ],
)
def test_patterns_name_what_they_name_in_peft(patterns: list[str]) -> None:
    theirs = {module: get_pattern_key(patterns, module) for module in MODULES}
    ours = first_matches(patterns, MODULES)
    named = {module: patterns[number] for module, number in ours.items()}
    assert named == {module: key for module, key in theirs.items() if key in patterns}


@pytest.mark.parametrize("pattern", ["(", "*", "[", "a{2,1}", "(?i)q_proj", "\\", "(?<=a*)b"])
def test_what_is_no_regular_expression_is_named(pattern: str) -> None:
    with pytest.raises(PatternError, match="not a regular expression"):
        first_matches(["q_proj", pattern], MODULES)


@pytest.mark.parametrize(
    "pattern", [r"(([a-z_.0-9])+)+!", r"(.*)*(.*)*(.*)*!", r"(\w+\.?)+!", "(a|a|[^!])" * 60 + "!", r"(?:.|.)+!"]
)
def test_one_that_takes_for_ever_is_given_up_while_other_threads_run(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns_module, "CPU_S", 1)
    began = time.thread_time()
    try:
        found = first_matches([pattern, "q_proj"], MODULES)
    except PatternError as error:
        assert "the limit" in str(error) and len(str(error)) < 500
    else:
        assert set(found.values()) == {1}
    assert time.thread_time() - began < 1, "the matching is no work of this process"


def test_their_number_and_lengths_are_bounded() -> None:
    with pytest.raises(PatternError, match=rf"the limits are {MAX_PATTERNS:,}"):
        first_matches(["q_proj"] * (MAX_PATTERNS + 1), MODULES)
    with pytest.raises(PatternError, match=rf"longer than {MAX_CHARS:,}") as caught:
        first_matches(["q" * 100_000], MODULES)
    assert len(str(caught.value)) < 500
