"""Bodies: what is read, refused by name or ignored, over HTTP."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lorafleet.controller.gateway.api.body import decode
from lorafleet.controller.gateway.api.schema import ChatRequest, CompletionRequest, LoadAdapterBody
from lorafleet.workers.errors import InvalidRequestError

HEADER = "x-lorafleet-ignored-fields"
COMPLETION = {"model": "tiny", "prompt": "hello", "max_tokens": 2}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
LOAD = {"lora_name": "new", "lora_path": "/adapters/new"}

# What clients send to every server they know, with their defaults.
SILLY_TAVERN = {
    "prompt": "hello",
    "model": "tiny",
    "max_new_tokens": 8,
    "max_tokens": 8,
    "logprobs": None,
    "temperature": 0.7,
    "top_p": 0.9,
    "typical_p": 1,
    "typical": 1,
    "sampler_seed": None,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "rep_pen": 1.1,
    "rep_pen_range": 0,
    "repetition_penalty_range": 0,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "top_k": 40,
    "skew": 0,
    "min_tokens": 0,
    "add_bos_token": True,
    "smoothing_factor": 0,
    "smoothing_curve": 1,
    "dry_allowed_length": 2,
    "dry_multiplier": 0,
    "dry_base": 1.75,
    "dry_sequence_breakers": '["\\n"]',
    "dry_penalty_last_n": 0,
    "stopping_strings": ["\nUser:"],
    "stop": ["\nUser:"],
    "truncation_length": 2048,
    "ban_eos_token": False,
    "skip_special_tokens": True,
    "top_a": 0,
    "tfs": 1,
    "mirostat_mode": 0,
    "mirostat_tau": 5,
    "mirostat_eta": 0.1,
    "custom_token_bans": "",
    "banned_strings": [],
    "api_type": "vllm",
    "api_server": "http://127.0.0.1:8000",
    "xtc_threshold": 0.1,
    "xtc_probability": 0,
    "nsigma": 0,
    "top_n_sigma": 0,
    "min_keep": 0,
    "adaptive_target": -0.01,
    "adaptive_decay": 0.9,
    "guidance_scale": 1,
    "negative_prompt": "",
    "grammar_string": "",
    "n": 1,
    "ignore_eos": False,
    "spaces_between_special_tokens": True,
}


def ignored(kind: Any, fields: dict[str, Any], *, strict: bool = False) -> list[str]:
    return decode(json.dumps(fields).encode(), kind, strict=strict).ignored


@pytest.mark.parametrize(
    ("kind", "usual", "extra", "names"),
    [
        (CompletionRequest, COMPLETION, {}, []),
        (CompletionRequest, COMPLETION, {"tempurature": 1}, ["tempurature"]),
        (CompletionRequest, COMPLETION, {"a": 1, "b": {"c": [1]}, "a ": 0}, ["a", "b", "a "]),
        (CompletionRequest, COMPLETION, {"a": None, "user": None}, []),
        (CompletionRequest, COMPLETION, {"a": False, "b": "", "c": []}, ["a", "b", "c"]),
        (CompletionRequest, COMPLETION, {"a": "x" * 300_000}, ["a"]),
        (CompletionRequest, COMPLETION, {"user": "u", "metadata": {"a": "b"}}, ["user", "metadata"]),
        (ChatRequest, CHAT, {"store": True, "service_tier": "flex", "prediction": {}}, None),
        (
            ChatRequest,
            CHAT,
            {"store": False, "service_tier": "auto", "modalities": ["text"], "verbosity": "medium"},
            [],
        ),
        (ChatRequest, CHAT, {"stream": True, "stream_options": {"include_usage": True, "x": 1}}, ["stream_options.x"]),
        (ChatRequest, CHAT, {"stream": True, "stream_options": {"include_obfuscation": False}}, []),
        (ChatRequest, CHAT, {"mirostat_tau": 5, "dry_base": 2}, ["mirostat_tau", "dry_base"]),
        (LoadAdapterBody, LOAD, {"temperature": 1, "load_inplace": True}, ["temperature"]),
        (LoadAdapterBody, LOAD, {"lora_int_id": None, "is_3d_lora_weight": False}, []),
    ],
)
def test_what_does_not_change_the_answer_is_ignored_by_name(
    kind: Any, usual: dict[str, Any], extra: dict[str, Any], names: list[str] | None
) -> None:
    assert ignored(kind, usual | extra) == (list(extra) if names is None else names)


@pytest.mark.parametrize(
    ("kind", "usual", "name", "value"),
    [
        (CompletionRequest, COMPLETION, "suffix", "end"),
        (CompletionRequest, COMPLETION, "messages", CHAT["messages"]),
        (CompletionRequest, COMPLETION, "max_completion_tokens", 5),
        (CompletionRequest, COMPLETION, "typical_p", 0.9),
        (CompletionRequest, COMPLETION, "mirostat", 2),
        (CompletionRequest, COMPLETION, "grammar", "root ::= [a-z]"),
        (CompletionRequest, COMPLETION, "adapter_id", "sql"),
        (CompletionRequest, COMPLETION, "ebnf", "x" * 300),
        (ChatRequest, CHAT, "prompt", "hello"),
        (ChatRequest, CHAT, "verbosity", "low"),
        (ChatRequest, CHAT, "web_search_options", {}),
        (ChatRequest, CHAT, "dry_multiplier", 0.8),
        (ChatRequest, CHAT, "do_sample", False),
        (LoadAdapterBody, LOAD, "lora_int_id", 7),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_what_would_change_the_answer_is_refused_by_name(
    kind: Any, usual: dict[str, Any], name: str, value: Any, strict: bool
) -> None:
    with pytest.raises(InvalidRequestError, match="not supported") as caught:
        ignored(kind, usual | {name: value}, strict=strict)
    assert caught.value.param == name
    assert ignored(kind, usual | {name: None}, strict=strict) == []


@pytest.mark.parametrize("extra", [{"tempurature": 1}, {"store": True}, {"stream_options": {"x": 1}, "stream": True}])
def test_strict_fields_refuse_what_is_ignored_otherwise(extra: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="Leave it out"):
        ignored(ChatRequest, CHAT | extra, strict=True)
    with pytest.raises(InvalidRequestError, match=r"stream_options\.x") as caught:
        ignored(ChatRequest, CHAT | {"stream": True, "stream_options": {"x": 1}}, strict=True)
    assert caught.value.param == "stream_options"
    harmless = {"user": "u", "metadata": {}, "store": False, "tools": [], "no_such_field": None}
    assert ignored(ChatRequest, CHAT | harmless, strict=True) == ["user", "metadata"]


@pytest.mark.parametrize(
    ("name", "own", "value", "another"),
    [
        ("n_predict", "max_tokens", 7, 8),
        ("max_new_tokens", "max_tokens", 7, 8),
        ("repeat_penalty", "repetition_penalty", 1.5, 1.0),
        ("stop_sequences", "stop", ["a"], ["b"]),
        ("ignore_eos_token", "ignore_eos", True, False),
        ("rid", "request_id", "abc", "abd"),
    ],
)
def test_other_servers_names_mean_the_same(name: str, own: str, value: Any, another: Any) -> None:
    usual = {"prompt": "hello"}

    def read(fields: dict[str, Any]) -> Any:
        body = decode(json.dumps(usual | fields).encode(), CompletionRequest)
        assert body.ignored == []
        return getattr(body.fields, own)

    assert read({name: value}) == read({name: value, own: value}) == read({name: value, own: None}) == value
    assert read({name: None, own: value}) == value
    with pytest.raises(InvalidRequestError, match="means the same") as caught:
        read({name: value, own: another})
    assert caught.value.param == name
    with pytest.raises(InvalidRequestError, match=name):
        read({name: {"a": 1}})


async def test_a_client_that_sends_all_its_settings_is_answered(fleet: Any) -> None:
    async with fleet.http.post("/v1/completions", json=SILLY_TAVERN) as response:
        assert response.status == 200, await response.text()
        assert "api_server" in response.headers[HEADER]
    sampling = fleet.worker.generates[0].sampling
    assert (sampling.max_tokens, round(sampling.repetition_penalty, 3)) == (8, 1.1)


@pytest.mark.parametrize("model", [{}, {"model": None}, {"model": ""}])
async def test_without_a_model_the_base_model_answers(fleet: Any, model: dict[str, Any]) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "hello", "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": CHAT["messages"], "max_tokens": 1}),
    ):
        status, answer = await fleet.post(path, body | model)
        assert (status, answer["model"]) == (200, "tiny")
        assert fleet.worker.generates[-1].adapter_digest == ""
        status, answer = await fleet.post(path, body | model | {"adapters": [{"name": "sql-adapter"}]})
        assert status == 200
        assert fleet.worker.generates[-1].adapter_digest == "d-sql"
    assert (await fleet.post("/tokenize", {"prompt": "hello"} | model))[0] == 200
    assert (await fleet.post("/detokenize", {"tokens": [5]} | model))[0] == 200


async def test_more_tokens_than_fit_are_reduced_to_those_that_do(fleet: Any) -> None:
    for body in (
        {"prompt": [5] * 60, "max_tokens": 5},
        {"prompt": [5] * 60, "max_tokens": 2**31 - 1},
        {"prompt": [5] * 60, "max_tokens": 4},
    ):
        assert (await fleet.post("/v1/completions", body))[0] == 200
        assert fleet.worker.generates[-1].sampling.max_tokens == 4
    assert (await fleet.post("/v1/chat/completions", CHAT | {"max_tokens": 5000}))[0] == 200
    generate = fleet.worker.generates[-1]
    assert generate.sampling.max_tokens == 64 - len(generate.prompt_token_ids)
    await fleet.post("/v1/chat/completions", CHAT | {"max_tokens": 3, "max_completion_tokens": 4})
    assert fleet.worker.generates[-1].sampling.max_tokens == 4


async def test_a_prompt_that_does_not_fit_is_refused_in_words_that_clients_look_for(fleet: Any) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": [5] * 64}),
        ("/v1/completions", {"prompt": [[5] * 65]}),
        ("/v1/completions", {"prompt": "hello " * 64}),
        ("/v1/completions", {"prompt": "hello " * 5000}),
        ("/v1/completions", {"prompt": [5] * 60, "min_tokens": 5, "max_tokens": 5}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello " * 2000}]}),
    ):
        status, answer = await fleet.post(path, body)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert "This model's maximum context length is 64 tokens" in answer["error"]["message"]


async def test_many_choices_may_be_asked_for(fleet: Any) -> None:
    status, answer = await fleet.post("/v1/completions", COMPLETION | {"n": 128, "max_tokens": 1})
    assert status == 200
    assert [choice["index"] for choice in answer["choices"]] == list(range(128))
