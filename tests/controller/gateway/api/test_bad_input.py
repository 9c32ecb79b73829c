"""Every mistake of a caller that the gateway detects: status, code, the field's name, and no request to a worker."""

from __future__ import annotations

import importlib
import json
import threading
from typing import Any

import pytest

HI = [{"role": "user", "content": "hello"}]

# (body beyond model and prompt, the field that the error names, a part of its message)
COMPLETIONS: list[tuple[dict[str, Any], str | None, str]] = [
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": [[]]}, "prompt", "empty"),
    ({"prompt": ["a", ""]}, "prompt", "empty"),
    ({"prompt": ["a"] * 129}, "prompt", "128"),
    ({"prompt": [1, "a"]}, "prompt", "mixes"),
    ({"prompt": ["a", [1]]}, "prompt", "mixes"),
    ({"prompt": [1, True]}, "prompt", "bool"),
    ({"prompt": [1, 2.0]}, "prompt", "float"),
    ({"prompt": [-1]}, "prompt", "-1"),
    ({"prompt": [10**6]}, "prompt", "1000000"),
    ({"prompt": [2**70]}, "prompt", str(2**70)),
    ({"prompt": {}}, "prompt", "object"),
    ({"prompt": None}, "prompt", "null"),
    ({"prompt": [5] * 64}, "prompt", "64"),
    ({"prompt": [5] * 60, "max_tokens": 5}, "max_tokens", "65"),
    ({"prompt": [5] * 60, "min_tokens": 5}, "min_tokens", "4"),
    ({"max_tokens": 0}, "max_tokens", "0"),
    ({"max_tokens": -1}, "max_tokens", "-1"),
    ({"max_tokens": "5"}, "max_tokens", "str"),
    ({"max_tokens": 5.0}, "max_tokens", "float"),
    ({"max_tokens": True}, "max_tokens", "bool"),
    ({"max_tokens": 10**30}, "max_tokens", "between"),
    ({"temperature": -0.1}, "temperature", "-0.1"),
    ({"temperature": 1e9}, "temperature", "between"),
    ({"temperature": "hot"}, "temperature", "str"),
    ({"temperature": False}, "temperature", "bool"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_p": 1.5}, "top_p", "1.5"),
    ({"top_k": -2}, "top_k", "-2"),
    ({"min_p": 2}, "min_p", "2"),
    ({"n": 0}, "n", "0"),
    ({"n": 17}, "n", "17"),
    ({"n": 10**9}, "n", "1000000000"),
    ({"n": True}, "n", "bool"),
    ({"seed": 2**64}, "seed", "between"),
    ({"seed": "a"}, "seed", "str"),
    ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
    ({"presence_penalty": 3}, "presence_penalty", "3"),
    ({"frequency_penalty": -3}, "frequency_penalty", "-3"),
    ({"stop": ""}, "stop", "empty"),
    ({"stop": ["a"] * 17}, "stop", "17"),
    ({"stop": "x" * 257}, "stop", "257"),
    ({"stop": [1]}, "stop", "int"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids", "1000000"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "-1"),
    ({"min_tokens": 20}, "min_tokens", "20"),
    ({"logprobs": 21}, "logprobs", "21"),
    ({"logprobs": -1}, "logprobs", "-1"),
    ({"logprobs": True}, "logprobs", "bool"),
    ({"echo": True, "logprobs": 1}, "echo", "logprobs"),
    ({"stream": "yes"}, "stream", "str"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "x"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options", "continuous_usage_stats"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "between -100 and 100"),
    ({"logit_bias": {"1000000": 1}}, "logit_bias", "1000000"),
    ({"logit_bias": {"-5": 1}}, "logit_bias", "-5"),
    ({"logit_bias": {"five": 1}}, "logit_bias", "'five'; keys must be token ids"),
    ({"logit_bias": {"5": "1"}}, "logit_bias", "str"),
    ({"logit_bias": {"5": None}}, "logit_bias", "null"),
    ({"logit_bias": [[5, 1]]}, "logit_bias", "array"),
    ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias", "1024"),
    ({"best_of": 2}, "best_of", "not supported"),
    ({"suffix": "end"}, "suffix", "not supported"),
    ({"prompt_logprobs": 0}, "prompt_logprobs", "not supported"),
    ({"prompt_logprobs": -1}, "prompt_logprobs", "not supported"),
    ({"use_beam_search": True}, "use_beam_search", "not supported"),
    ({"guided_json": {"type": "strin"}}, "guided_json", "strin"),
    ({"guided_regex": "(a"}, "guided_regex", "unclosed"),
    ({"guided_choice": []}, "guided_choice", "list of texts"),
    ({"guided_grammar": "start: nothing"}, "guided_grammar", "nothing"),
    ({"structured_outputs": {}}, "structured_outputs", "asks for nothing"),
    ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "json and regex"),
    ({"guided_regex": "a", "guided_json": {}}, "guided_regex", "Give one of them"),
    ({"bad_words": "a"}, "bad_words", "str"),
    ({"bad_words": [""]}, "bad_words", "empty"),
    ({"bad_words": ["a" * 257]}, "bad_words", "257"),
    ({"bad_words": ["a"] * 257}, "bad_words", "256"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "empty"),
    ({"allowed_token_ids": [10**6]}, "allowed_token_ids", "1000000"),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids", "-1"),
    ({"allowed_token_ids": [True]}, "allowed_token_ids", "bool"),
    ({"allowed_token_ids": [1] * 16385}, "allowed_token_ids", "16384"),
    ({"service_tier": "flex"}, "service_tier", "not supported"),
    ({"store": True}, "store", "not supported"),
    ({"tempurature": 1}, "tempurature", "not a known field"),
    ({"model": 5}, "model", "int"),
    ({"model": None}, "model", "null"),
]

CHAT: list[tuple[dict[str, Any], str | None, str]] = [
    ({"messages": []}, "messages", "empty"),
    ({"messages": "hello"}, "messages", "str"),
    ({"messages": ["hello"]}, "messages", "str"),
    ({"messages": [{}]}, "messages", "role"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages", "robot"),
    ({"messages": [{"role": 5, "content": "a"}]}, "messages", "int"),
    ({"messages": [{"role": "user"}]}, "messages", "content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages", "int"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages", "image_url"),
    ({"messages": [{"role": "user", "content": "hello " * 100}]}, "messages", "context"),
    ({"max_tokens": 1000}, "max_tokens", "context"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "one of them"),
    ({"logprobs": 5}, "logprobs", "int"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "21"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "-1"),
    ({"tools": [{"type": "function"}]}, "tools", "missing required field"),
    ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
    ({"functions": [{}]}, "functions", "not supported"),
    ({"response_format": {"type": "xml"}}, "response_format", "xml"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema is missing"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}}, "response_format", "5"),
    ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
    ({"audio": {}}, "audio", "not supported"),
    ({"chat_template": "{{ 1 }}"}, "chat_template", "not supported"),
    ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs", "not supported"),
    ({"continue_final_message": True}, "continue_final_message", "not supported"),
    ({"echo": True}, "echo", "not supported"),
    ({"prompt": "hello"}, "prompt", "not a known field"),
]

# (raw body, a part of the message)
MALFORMED: list[tuple[bytes, str]] = [
    (b"", "JSON"),
    (b"{", "JSON"),
    (b"{}x", "JSON"),
    (b"[]", "object"),
    (b'"text"', "object"),
    (b"null", "object"),
    (b"{}", "'model' is required"),
    (b'{"model":"tiny"}', "'prompt' is required"),
    (b'{"model":"tiny","prompt":"a","temperature":NaN}', "JSON"),
    (b'{"model":"tiny","prompt":"a","temperature":Infinity}', "JSON"),
    (b'{"model":"tiny","prompt":"a","temperature":1e999}', "out of range"),
    (b'{"model":"tiny","prompt":"\xff"}', "UTF-8"),
    (b'{"model":"tiny","prompt":"\\ud800"}', "JSON"),
    (b'\xef\xbb\xbf{"model":"tiny","prompt":"a"}', "JSON"),
    (b'{"model":"tiny","prompt":' + b"[" * 50_000 + b"]" * 50_000 + b"}", ""),
    (b'{"model":"tiny","prompt":"a","x":' + b"[" * 50_000 + b"]" * 50_000 + b"}", "nested"),
]


async def _refused(fleet: Any, path: str, body: Any, param: str | None, part: str) -> None:
    status, answer = await fleet.post(path, body)
    error = answer["error"]
    assert status == 400, answer
    assert error["type"] == "invalid_request_error"
    assert error["code"] in ("invalid_request", "context_length_exceeded")
    assert error["param"] == param, error
    assert part in error["message"], error


@pytest.mark.parametrize("stream", [False, True])
async def test_bad_completions_are_refused_by_name(fleet: Any, stream: bool) -> None:
    for extra, param, part in COMPLETIONS:
        body = {"model": "tiny", "prompt": "hello", **({"stream": True} if stream else {}), **extra}
        if param == "stream_options" and part == "stream":
            body.pop("stream", None)
        await _refused(fleet, "/v1/completions", body, param, part)
    assert fleet.worker.generates == []


async def test_bad_chats_are_refused_by_name(fleet: Any) -> None:
    for extra, param, part in CHAT:
        await _refused(fleet, "/v1/chat/completions", {"model": "tiny", "messages": HI, **extra}, param, part)
    assert fleet.worker.generates == []


async def test_malformed_bodies_are_refused(fleet: Any) -> None:
    for body, part in MALFORMED:
        status, answer = await fleet.post("/v1/completions", body)
        assert status == 400, (body[:60], answer)
        assert part in answer["error"]["message"], (body[:60], answer)


async def test_a_field_that_holds_too_much_is_named(fleet: Any) -> None:
    for path, name, value, part in (
        ("/v1/chat/completions", "messages", b"[" + b"{}," * 70_000 + b"{}]", "70002 objects"),
        (
            "/v1/chat/completions",
            "messages",
            b'[{"role":"user","content":' + b"[" * 600 + b"]" * 600 + b"}]",
            "602 deep",
        ),
        ("/v1/completions", "prompt", b"[" + b'"a",' * 70_000 + b'"a"]', "70001 strings"),
        ("/v1/completions", "stop", b"[" + b'"a",' * 70_000 + b'"a"]', "70001 strings"),
        ("/v1/completions", "stop_token_ids", b"[" + b"1," * 1_100_000 + b"1]", "1100001 values"),
        ("/v1/completions", "stop_token_ids", b"[" + b"1," * 100_000 + b"1]", "200003 bytes; the limit is 131072"),
        ("/v1/completions", "cache_salt", b'"' + b"a" * 200_000 + b'"', "200002 bytes"),
        ("/detokenize", "tokens", b"[" + b"1," * 1_100_000 + b"1]", "1100001 values"),
        ("/detokenize", "tokens", b"[" + b"1," * 1000 + b"1]", "1001 ids; the limit is 256"),
    ):
        status, answer = await fleet.post(path, b'{"model":"tiny","%s":%s}' % (name.encode(), value))
        assert (status, answer["error"]["param"]) == (400, name), answer
        assert part in answer["error"]["message"], answer
    status, answer = await fleet.post("/v1/completions", b'{"model":"tiny",' + b'"a":1,' * 70_000 + b'"b":1}')
    assert (status, answer["error"]["param"]) == (400, None)
    assert "strings" in answer["error"]["message"]


async def test_ids_and_text_that_are_too_long_get_the_same_error(fleet: Any) -> None:
    word = "hello "
    for num_tokens in (64, 65, 130, 2000):
        answers = [
            await fleet.post("/v1/completions", {"model": "tiny", "prompt": prompt, **extra})
            for prompt in ([5] * num_tokens, [[5] * num_tokens], word * num_tokens, [word * num_tokens])
            for extra in ({}, {"max_tokens": 1}, {"stream": True})
        ]
        errors = {(status, answer["error"]["code"], answer["error"]["param"]) for status, answer in answers}
        assert errors == {(400, "context_length_exceeded", "prompt")}, num_tokens


async def test_zero_is_a_value_and_not_what_is_taken_where_none_is_given(fleet: Any) -> None:
    body = {"model": "tiny", "prompt": "hello", "temperature": 0, "top_k": 0, "seed": 0, "priority": 0, "logprobs": 0}
    status, _ = await fleet.post("/v1/completions", body)
    assert status == 200
    generate = fleet.worker.generates[-1]
    sampling = generate.sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed, generate.priority) == (0, 0, 0, 0)
    assert sampling.HasField("logprobs")  # 0 candidates are asked for
    tiny = {"top_p": 1e-300, "repetition_penalty": 1e-300, "min_p": 1e-300}
    assert (await fleet.post("/v1/completions", {"model": "tiny", "prompt": "hello", **tiny}))[0] == 200
    sampling = fleet.worker.generates[-1].sampling
    assert 0 < sampling.top_p < 1e-30 and 0 < sampling.repetition_penalty < 1e-30  # 0 would be out of range
    for name in ("max_tokens", "max_completion_tokens", "n"):
        status, answer = await fleet.post("/v1/chat/completions", {"model": "tiny", "messages": HI, name: 0})
        assert (status, answer["error"]["param"]) == (400, name)


async def test_an_answer_repeats_little_of_what_the_client_calls_the_model(fleet: Any) -> None:
    name = "+".join(["sql-adapter:1." + "0" * 200, "org/pirate:0." + "5" * 100])
    async with fleet.http.post(
        "/v1/completions", json={"model": name, "prompt": "hello", "max_tokens": 3, "stream": True}
    ) as response:
        assert response.status == 200
        events = (await response.read()).decode().split("\n\n")
    assert all(len(event) < 600 for event in events)
    assert json.loads(events[0].removeprefix("data: "))["model"] == name[:256]
    status, answer = await fleet.post("/v1/completions", {"model": name, "prompt": "hello", "max_tokens": 3})
    assert (status, answer["model"]) == (200, name[:256])
    for digits in (32_768, 1_000_000):
        body = json.dumps({"model": "sql-adapter:" + "9" * digits, "prompt": "hello"}).encode()
        status, answer = await fleet.post("/v1/completions", body)
        assert status in (400, 404)
        assert answer["error"]["param"] == "model"
        assert len(answer["error"]["message"]) < 300


async def test_long_names_and_paths_of_adapters_do_not_reach_the_controller(fleet: Any) -> None:
    for body, param in (
        ({"lora_name": "a" * 257, "lora_path": "/a"}, "lora_name"),
        ({"lora_name": "a", "lora_path": "/a" * 2049}, "lora_path"),
        ({"lora_name": "a", "lora_path": "/a\0"}, "lora_path"),
        ({"lora_name": "a", "lora_path": "/a" * 100_000}, "lora_path"),
    ):
        status, answer = await fleet.post("/v1/load_lora_adapter", body)
        assert (status, answer["error"]["param"]) == (400, param)
        assert len(answer["error"]["message"]) < 400
    assert fleet.controller.loads == []


async def test_slow_work_runs_on_the_threads_for_text(fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    where: list[tuple[str, bool]] = []

    def watch(name: str) -> None:
        module, _, function = name.rpartition(".")
        original = getattr(importlib.import_module(f"lorafleet.controller.gateway.api.{module}"), function)

        def noting(*args: Any, **options: Any) -> Any:
            where.append((function, threading.current_thread() is threading.main_thread()))
            return original(*args, **options)

        monkeypatch.setattr(f"lorafleet.controller.gateway.api.{name}", noting)

    for name in (
        "door.decode",
        "completions.read_prompts",
        "completions.encode_prompts",
        "completions.echoes_of",
    ):
        watch(name)
    small = {"model": "tiny", "prompt": "hello", "echo": True, "max_tokens": 1}
    assert (await fleet.post("/v1/completions", small))[0] == 200
    assert where == [("decode", True), ("read_prompts", True), ("encode_prompts", False), ("echoes_of", False)]
    where.clear()
    large = small | {"user": "x" * 100_000}
    assert (await fleet.post("/v1/completions", large))[0] == 200
    assert where == [("decode", False), ("read_prompts", False), ("encode_prompts", False), ("echoes_of", False)]


async def test_an_unknown_model_is_404_with_near_matches(fleet: Any) -> None:
    for path, extra in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": HI})):
        status, answer = await fleet.post(path, {"model": "sql_adaptor", **extra})
        assert status == 404
        assert answer["error"]["code"] == "model_not_found"
        assert answer["error"]["param"] == "model"
        assert "'sql-adapter'" in answer["error"]["message"]
        assert "/v1/models" in answer["error"]["message"]
    status, answer = await fleet.post("/v1/completions", {"model": "x" * 100_000, "prompt": "a"})
    assert status == 404
    assert len(answer["error"]["message"]) < 500


async def test_a_wrong_content_type_or_encoding_is_refused(fleet: Any) -> None:
    body = json.dumps({"model": "tiny", "prompt": "a"}).encode()
    for headers, part in (
        ({"Content-Type": "text/plain"}, "application/json"),
        ({"Content-Type": "application/json", "Content-Encoding": "br"}, "'br'"),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, ""),
    ):
        status, answer = await fleet.post("/v1/completions", body, headers=headers)
        assert status == 400, answer
        assert part in answer["error"]["message"]


async def test_unknown_paths_and_methods_are_json_errors(fleet: Any) -> None:
    for method, path, wanted, code in (
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
    ):
        async with fleet.http.request(method, path) as response:
            assert response.status == wanted
            assert response.headers["x-request-id"]
            assert (await response.json())["error"]["code"] == code


async def test_a_bug_is_a_generic_500_with_the_request_id(
    fleet: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("secret at 0x7fff")

    monkeypatch.setattr("lorafleet.controller.gateway.api.completions.sampling_params", broken)
    async with fleet.http.post(
        "/v1/completions", json={"model": "tiny", "prompt": "a"}, headers={"x-request-id": "r-1"}
    ) as response:
        assert response.status == 500
        assert response.headers["x-should-retry"] == "false"
        text = await response.text()
    assert "secret" not in text
    assert "r-1" in text
    assert "secret" in caplog.text
