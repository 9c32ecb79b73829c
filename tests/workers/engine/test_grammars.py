"""Requests with a grammar give what it allows, and leave others as they are."""

from __future__ import annotations

import datetime
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tiny
from schemas import CATEGORIES, schema_of
from tiny import Result, run_engine

from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine import grammars as engine_grammars
from lorafleet.workers.engine.grammars import MAX_GRAMMARS
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.errors import AdapterUnavailableError, InvalidRequestError
from lorafleet.workers.grammars.grammar_text import (
    choice_grammar,
    json_object_grammar,
    json_schema_grammar,
    regex_grammar,
)
from lorafleet.workers.scheduling.request import FinishReason, GenerateRequest
from lorafleet.workers.scheduling.sampling_options import SamplingOptions
from lorafleet.workers.text.files import read_text_files
from lorafleet.workers.text.tokenizer import Tokenizer

PROMPT = tuple(range(7, 30))
NUM_DOCUMENTS = 10_000 if os.environ.get("LORAFLEET_TEST_ALL") else 200
EOS = 1


@dataclass
class Files:
    """A tiny model with its tokenizer."""

    model: Path
    tokenizer: Tokenizer

    def text(self, result: Result) -> str:
        return self.tokenizer.decode(result.token_ids)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("grammars")
    tiny.make_model("smollm2", root / "model", eos_token_id=EOS)
    tiny.save_tokenizer(root / "model")
    return Files(root / "model", Tokenizer.from_files(read_text_files(root / "model")))


@pytest.fixture
def engine_of(files: Files) -> Iterator[Callable[..., Engine]]:
    opened: list[Engine] = []

    def make(*, overlaps: bool = False, **changes: Any) -> Engine:
        config = EngineConfig(model=str(files.model), dtype="float32", device="cpu", lora=LoRAConfig(max_loras=2))
        engine = Engine.from_config(replace(config, **changes))
        engine.load()
        engine._overlaps = overlaps
        opened.append(engine)
        return engine

    yield make
    for engine in opened:
        engine.check_integrity()
        assert not engine._grammars and not engine._grammars._ready
        engine.close()


def asks(name: str, grammar: str = "", *, seed: int = 0, max_tokens: int = 200, **options: Any) -> GenerateRequest:
    return GenerateRequest(name, PROMPT, SamplingOptions(max_tokens=max_tokens, seed=seed, grammar=grammar, **options))


FORMATS = jsonschema.FormatChecker(["uuid", "ipv4"])


@FORMATS.checks("date", raises=ValueError)
def is_date(text: str) -> bool:
    """Return whether a month has such a day, in some year: RFC 3339 has a year 0, which Python has not."""
    return len(text) == 10 and bool(datetime.date.fromisoformat("2000" + text[4:])) and text[:4].isdecimal()


def assert_documents(files: Files, schemas: dict[str, Any], results: dict[str, Result]) -> int:
    """Check that every document that has ended follows its schema; return how many have."""
    num_ended = 0
    for name, schema in schemas.items():
        result = results[name]
        assert result.finish in (FinishReason.COMPLETE, FinishReason.STOP, FinishReason.LENGTH), (schema, result)
        if result.finish is FinishReason.LENGTH:
            continue
        document = json.loads(files.text(result))
        checker = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
        assert not list(checker.iter_errors(document)), (schema, document)
        num_ended += 1
    return num_ended


def test_documents_follow_their_schemas_and_the_rows_between_them_keep_their_tokens(
    files: Files, engine_of: Callable[..., Engine]
) -> None:
    """Half of each batch is unconstrained."""
    engine = engine_of(max_num_seqs=32)
    free = [asks(f"free {i}", seed=i, max_tokens=40, temperature=i % 3) for i in range(16)]
    alone = run_engine(engine, free)
    num_ended, categories = 0, list(CATEGORIES)
    for first in range(0, NUM_DOCUMENTS, 100):
        schemas = {
            f"{category} {number}": schema_of(category, number)
            for number in range(first, first + 100)
            for category in [categories[number % len(categories)]]
        }
        requests = [asks(name, json_schema_grammar(schema), seed=first) for name, schema in schemas.items()]
        mixed = [request for pair in zip(requests, free, strict=False) for request in pair]
        results = run_engine(engine, [*mixed, *requests[len(free) :]])
        num_ended += assert_documents(files, schemas, results)
        for request in free:
            assert results[request.request_id].token_ids == alone[request.request_id].token_ids
    assert num_ended > 0.9 * NUM_DOCUMENTS


KINDS = {
    "choice": (choice_grammar(["yes", "no", "maybe not"]), "yes|no|maybe not"),
    "regex": (regex_grammar("[a-f]{3}-[0-9]{2}"), "[a-f]{3}-[0-9]{2}"),
    "Lark": ('start: "<" body ">"\nbody: /[xy]{0,5}/ ("," /[xy]/)?', "<[xy]{0,5}(,[xy])?>"),
}


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_grammar_is_followed_to_its_end(
    files: Files, engine_of: Callable[..., Engine], kind: str, overlaps: bool
) -> None:
    grammar, pattern = KINDS[kind]
    engine = engine_of(overlaps=overlaps)
    for ignore_eos in (False, True):
        requests = [asks(f"{i}", grammar, seed=i, ignore_eos=ignore_eos, temperature=i % 3) for i in range(12)]
        for result in run_engine(engine, requests).values():
            assert result.finish in (FinishReason.COMPLETE, FinishReason.STOP)
            assert re.fullmatch(pattern, files.text(result)), result


OBJECT = json_schema_grammar(schema_of("nested object", 3))


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_resumed_request_gives_what_would_have_come(engine_of: Callable[..., Engine], overlaps: bool) -> None:
    whole = run_engine(engine_of(), [asks("whole", OBJECT, seed=3)])["whole"]
    assert len(whole.token_ids) > 20
    engine = engine_of(overlaps=overlaps)
    for num_before in (1, 7, len(whole.token_ids) - 1):
        cut = replace(asks("cut", OBJECT, seed=3), output_token_ids=tuple(whole.token_ids[:num_before]))
        result = run_engine(engine, [cut])["cut"]
        assert (result.token_ids, result.finish) == (whole.token_ids[num_before:], whole.finish)


@pytest.mark.parametrize("overlaps", [False, True])
def test_preempted_requests_give_the_same(engine_of: Callable[..., Engine], overlaps: bool) -> None:
    requests = [asks(f"{i}", OBJECT if i % 2 else "", seed=i, max_tokens=38) for i in range(16)]
    expected = run_engine(engine_of(), requests)
    engine = engine_of(overlaps=overlaps, max_num_seqs=16, kv_cache_memory_bytes=100_000, max_model_len=64)
    results = run_engine(engine, requests)
    assert engine.stats().num_preemptions > 0
    assert {name: (r.token_ids, r.finish) for name, r in results.items()} == {
        name: (r.token_ids, r.finish) for name, r in expected.items()
    }


def test_a_grammar_works_with_the_other_options(files: Files, engine_of: Callable[..., Engine]) -> None:
    requests = [
        asks("logged", OBJECT, logprobs=3),
        asks("greedy", OBJECT, temperature=0.0),
        asks("penalised", OBJECT, repetition_penalty=1.4, presence_penalty=0.5),
        asks("min_tokens", choice_grammar(["a", "ab"]), min_tokens=2),
        asks("stop token", regex_grammar("[ab]*c?"), stop_token_ids=frozenset({files.tokenizer.token_to_id("b") or 0})),
    ]
    results = run_engine(engine_of(), requests)
    schemas = dict.fromkeys(("logged", "greedy", "penalised"), schema_of("nested object", 3))
    assert assert_documents(files, schemas, results) >= 2
    assert len(results["logged"].logprobs) == len(results["logged"].token_ids)
    assert files.text(results["min_tokens"]) == "ab"
    assert re.fullmatch("a*(b|c|<eos>)?", files.text(results["stop token"]))


def test_a_grammar_that_explodes_ends_its_request_alone(files: Files, engine_of: Callable[..., Engine]) -> None:
    engine = engine_of()
    later = regex_grammar("a{3}(.*b.{300}c.*|[ab]*x)") + "&"
    bad = {
        "syntax": "start: nothing",
        "nothing": 'start: "a" & "b"',
        "not lexed": "start: A\nA: /(.|\\n)*a.{20}b(.|\\n)*/ & /(.|\\n)*c.{20}(.|\\n)*/ & /(.|\\n)*d.{17}e/",
        "later": later,
    }
    requests = [asks("free", max_tokens=20), asks("good", OBJECT), *(asks(*case) for case in bad.items())]
    expected = run_engine(engine, requests[:2])
    results = run_engine(engine, requests)
    for name in bad:
        assert results[name].finish is FinishReason.ERROR and isinstance(results[name].error, InvalidRequestError)
    for name in ("free", "good"):
        assert results[name].token_ids == expected[name].token_ids


def test_a_grammar_that_is_compiled_holds_up_nobody_and_may_be_cancelled(
    engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, may_compile = engine_of(), threading.Event()
    compile_grammar = engine_grammars.compile_grammar

    def compile_later(*args: Any) -> Any:
        assert may_compile.wait(30)
        return compile_grammar(*args)

    monkeypatch.setattr(engine_grammars, "compile_grammar", compile_later)
    results = {name: Result() for name in ("waits", "also waits", "gone", "free")}
    for name in ("waits", "also waits", "gone"):
        engine.submit(asks(name, OBJECT, seed=5))
    engine.submit(asks("free", max_tokens=5))
    while results["free"].finish is None:
        engine.wait_for_work(timeout_s=1.0)
        tiny.gather(engine.step(), results)
    assert engine.stats().num_waiting == 3
    engine.check_integrity()
    engine.cancel("gone")
    tiny.gather(engine.step(), results)
    assert results["gone"].finish is FinishReason.CANCELLED and not results["waits"].token_ids
    may_compile.set()
    while engine.has_unfinished():
        engine.wait_for_work(timeout_s=1.0)
        tiny.gather(engine.step(), results)
    assert results["waits"].token_ids == results["also waits"].token_ids != []


def test_compiled_grammars_are_remembered_within_bounds(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(max_num_seqs=64)
    run_engine(engine, [asks(f"{i}", choice_grammar([f"{i}"])) for i in range(MAX_GRAMMARS + 50)])
    remembered = engine._grammars._compiled
    assert len(remembered) == MAX_GRAMMARS
    assert engine._grammars._num_chars == sum(len(grammar) for _, grammar in remembered)
    before = len(remembered)
    run_engine(engine, [asks("again", next(iter(remembered))[1])])
    assert len(remembered) == before


def test_an_adapters_own_tokenizer_has_its_own_vocabulary(files: Files, engine_of: Callable[..., Engine]) -> None:
    """Its ids may mean other bytes than the base model's."""
    own = read_text_files(files.model)
    data = json.loads(own["tokenizer.json"])
    vocab = data["model"]["vocab"]
    vocab["x"], vocab["y"] = vocab["y"], vocab["x"]
    own["tokenizer.json"] = json.dumps(data).encode()
    tokenizer = Tokenizer.from_files(own)
    engine = engine_of()
    engine.use_tokenizers({"own": tokenizer}.get)
    grammar = choice_grammar(["xxx"])
    results = run_engine(engine, [asks("base", grammar), replace(asks("own", grammar), text_digest="own")])
    assert files.text(results["base"]) == tokenizer.decode(results["own"].token_ids) == "xxx"
    assert results["base"].token_ids != results["own"].token_ids
    gone = run_engine(engine, [replace(asks("gone", grammar), text_digest="elsewhere")])["gone"]
    assert isinstance(gone.error, AdapterUnavailableError)


def test_an_added_token_can_stand_in_a_grammar(files: Files, engine_of: Callable[..., Engine]) -> None:
    own = read_text_files(files.model)
    config = json.loads(own["tokenizer_config.json"])
    config["extra_special_tokens"] = ["<call>"]
    own["tokenizer_config.json"] = json.dumps(config).encode()
    tokenizer = Tokenizer.from_files(own)
    assert tokenizer.token_to_id("<call>") is not None
    engine = engine_of()
    engine.use_tokenizers({"own": tokenizer}.get)
    vocabulary = engine._grammars.vocabularies.get("own")
    assert vocabulary.vocab_size > (tokenizer.token_to_id("<call>") or 0)
    assert engine_grammars.compile_grammar(vocabulary, 'start: <call> "a"').vocab_size == vocabulary.vocab_size


def test_a_model_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    tiny.make_model("smollm2", tmp_path)
    engine = Engine.from_config(EngineConfig(model=str(tmp_path), dtype="float32", device="cpu"))
    engine.load()
    engine.prepare_grammars()
    result = run_engine(engine, [asks("r", json_object_grammar())])["r"]
    assert isinstance(result.error, InvalidRequestError) and "tokenizer" in result.error.message
    engine.close()
