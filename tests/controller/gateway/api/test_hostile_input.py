"""Every field of every endpoint, with every kind of value an attacker may send.

The answer is below 500, short, and names the field; no worker gets a refused request.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from lorafleet.controller.gateway.api import schema

HUGE = "9" * 200_000
LONG = "x" * 300_000
DEEP = 50_000

# Written as JSON, since json.dumps cannot produce some of them.
VALUES: dict[str, str] = {
    "null": "null",
    "true": "true",
    "zero": "0",
    "minus one": "-1",
    "minus zero": "-0.0",
    "a fraction": "0.5",
    "a tiny number": "1e-999",
    "a number of 400 digits": "9" * 400,
    "a number of many digits": HUGE,
    "a negative one": "-" + HUGE,
    "a fraction of many digits": "0." + HUGE,
    "beyond a float": "1e999",
    "2^63": str(2**63),
    "2^64": str(2**64),
    "an empty string": '""',
    "a short string": '"a"',
    "null characters": r'"a\u0000b"',
    "control characters": r'"\u0001\u001b[31m\u202e"',
    "an escaped pair": r'"\ud83d\ude00"',
    "a long string": f'"{LONG}"',
    "a long string of escapes": '"' + r"\u0000" * 100_000 + '"',
    "digits of other scripts": '"sql-adapter:\u0661\u0662"',
    "a weight of many digits": f'"sql-adapter:{"9" * 32_768}"',
    "a weight of many zeros": f'"sql-adapter:1.{"0" * 200_000}"',
    "thousands of parts": '"' + "sql-adapter+" * 10_000 + 'a"',
    "more parts": '"' + "a+" * 100_000 + 'a"',
    "infinite weights": '"sql-adapter:1e999+org/pirate:-1e999"',
    "no weight": '"sql-adapter:nan"',
    "an empty list": "[]",
    "an empty object": "{}",
    "a list of null": "[null]",
    "mixed": '[1, "a", null, [1], {}]',
    "many numbers": "[" + "1," * 1_100_000 + "1]",
    "65,536 numbers": "[" + "1," * 65_535 + "1]",
    "many strings": "[" + '"a",' * 70_000 + '"a"]',
    "65,000 strings": "[" + '"a",' * 65_000 + '"a"]',
    "many lists": "[" + "[1]," * 70_000 + "[1]]",
    "65,000 lists": "[" + "[1]," * 65_000 + "[1]]",
    "many objects": "[" + "{}," * 70_000 + "{}]",
    "65,000 objects": "[" + "{}," * 65_000 + "{}]",
    "many keys": "{" + ",".join(f'"{n}":1' for n in range(70_000)) + "}",
    "a long key": '{"' + LONG + '":1}',
    "the same key many times": "{" + '"a":1,' * 70_000 + '"a":2}',
    "deep lists": "[" * DEEP + "]" * DEEP,
    "600 deep lists": "[" * 600 + "]" * 600,
    "deep objects": '{"a":' * 600 + "1" + "}" * 600,
    "deep and open": "[" * 200_000,
    "128 texts": "[" + ",".join(['"hello"'] * 128) + "]",
    "128 long texts": "[" + ",".join([f'"{"y" * 50_000}"'] * 128) + "]",
    "128 prompts of many ids": "[" + ",".join(["[" + "1," * 8000 + "1]"] * 128) + "]",
    "an id outside the vocabulary": "[1000000]",
    "ids of many digits": f"[{HUGE}]",
    "garbage": '{"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}',
    "biases": "{" + ",".join(f'"{n}":100' for n in range(50_000)) + "}",
    "tools": "[" + ",".join(['{"type":"function","function":{"name":"f"}}'] * 5000) + "]",
}

MESSAGES: dict[str, str] = {
    "a deep field": '[{"role":"user","content":"a","x":' + "[" * 600 + "]" * 600 + "}]",
    "a field 40 deep": '[{"role":"user","content":"a","x":' + "[" * 40 + "]" * 40 + "}]",
    "deep arguments": json.dumps(
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * DEEP + "]" * DEEP}}]}]
    ),
    "deep objects as arguments": json.dumps(
        [{"role": "assistant", "tool_calls": [{"function": {"arguments": '{"a":' * 900 + "1" + "}" * 900}}]}]
    ),
    "arguments of many objects": json.dumps(
        [{"role": "assistant", "tool_calls": [{"function": {"arguments": "[" + "{}," * 70_000 + "1]"}}]}]
    ),
    "arguments with a surrogate": json.dumps(
        [{"role": "assistant", "tool_calls": [{"function": {"arguments": '{"a": "\\ud800"}'}}], "content": ""}]
    ),
    "arguments with many digits": json.dumps(
        [
            {
                "role": "assistant",
                "tool_calls": [{"function": {"arguments": '{"a": ' + "9" * 5000 + "}"}}],
                "content": "a",
            }
        ]
    ),
    "tool calls of the wrong kind": '[{"role":"assistant","content":"a","tool_calls":[1,null,{"function":5}]}]',
    "many messages": "[" + ",".join(['{"role":"user","content":"a"}'] * 20_000) + "]",
    "10,000 messages": "[" + ",".join(['{"role":"user","content":"a"}'] * 10_000) + "]",
    "empty messages": "[" + "{}," * 10_000 + "{}]",
    "a long role": json.dumps([{"role": LONG, "content": "a"}]),
    "a role that is a list": '[{"role":["user"],"content":"a"}]',
    "a long content": json.dumps([{"role": "user", "content": LONG}]),
    "many parts": '[{"role":"user","content":[' + ",".join(['{"type":"text","text":"a"}'] * 10_000) + "]}]",
    "a part with a long type": json.dumps([{"role": "user", "content": [{"type": LONG}]}]),
    "a part with a type that is an object": '[{"role":"user","content":[{"type":{"a":[1,2,3]}}]}]',
    "a content that is a number": '[{"role":"user","content":5}]',
    "a number of many digits": '[{"role":"user","content":"a","x":' + "9" * 5000 + "}]",
    "a long key": '[{"role":"user","content":"a","' + LONG + '":1}]',
    "control characters": r'[{"role":"user","content":"\u0000\u0001\u202e\ud83d\ude00"}]',
}

ENDPOINTS: dict[str, tuple[type[msgspec.Struct], dict[str, str]]] = {
    "/v1/completions": (schema.CompletionRequest, {"model": '"tiny"', "prompt": '"hello"', "max_tokens": "2"}),
    "/v1/chat/completions": (
        schema.ChatRequest,
        {"model": '"tiny"', "messages": '[{"role":"user","content":"hello"}]', "max_tokens": "2"},
    ),
    "/tokenize": (schema.TokenizeRequest, {"model": '"tiny"', "prompt": '"hello"'}),
    "/detokenize": (schema.DetokenizeRequest, {"model": '"tiny"', "tokens": "[5]"}),
    "/v1/load_lora_adapter": (schema.LoadAdapterBody, {"lora_name": '"a"', "lora_path": '"/a"'}),
    "/v1/unload_lora_adapter": (schema.UnloadAdapterBody, {"lora_name": '"sql-adapter"'}),
}
CHANGES = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")  # which take a tenth of a second each
UNKNOWN = ("user", "metadata", "response_format", "audio", "tools", "tool_choice", "guided_json", "nonsense")


def fields_of(path: str) -> Iterator[str]:
    kind, _ = ENDPOINTS[path]
    yield from kind.__struct_fields__
    yield from (name for name in UNKNOWN if not (path in CHANGES and name in schema.ASKS_NOTHING))


def body_of(fields: dict[str, str]) -> bytes:
    return ("{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}").encode()


async def ask(fleet: Any, path: str, body: bytes) -> tuple[int, bytes]:
    async with fleet.http.post(path, data=io.BytesIO(body), headers={"Content-Type": "application/json"}) as response:
        return response.status, await response.read()


def check(status: int, answer: bytes, what: str, param: str | None) -> None:
    """Check that the answer is short, and that a refusal names the field if the field could be read."""
    assert status < 500, (what, answer[:500])
    assert status in (200, 400, 404, 409, 413, 422), (what, status)
    if status == 200:
        return
    error = json.loads(answer)["error"]
    assert len(answer) < 2500, (what, len(answer))
    assert error["message"], what
    if param is not None and error["param"] is not None:
        related = {param, "prompt", "stream_options", "max_tokens", "min_tokens", "top_logprobs", "echo", "adapters"}
        assert error["param"] in related, (what, error)


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_any_value_in_any_field_is_answered_below_500(fleet: Any, path: str) -> None:
    _, usual = ENDPOINTS[path]
    for name in fields_of(path):
        for kind, value in VALUES.items():
            status, answer = await ask(fleet, path, body_of(usual | {name: value}))
            check(status, answer, f"{path} {name}: {kind}", name)
            if name == "lora_name" and status == 200:
                await fleet.until(lambda: fleet.state.table.version == fleet.controller.table.version)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
async def test_any_messages_are_answered_below_500(fleet: Any, path: str) -> None:
    _, usual = ENDPOINTS[path]
    fields = {name: value for name, value in usual.items() if name != "prompt"}
    for kind, value in MESSAGES.items():
        status, answer = await ask(fleet, path, body_of(fields | {"messages": value}))
        check(status, answer, f"{path}: {kind}", "messages")


PATHS = (
    "/v1/models/%ED%A0%80",
    "/v1/models/%FF%FE",
    "/v1/models/a%00b",
    "/v1/models/%2F%2F..%2F..",
    "/v1/models/" + "x" * 7000,
    "/v1/models/" + "%F0%9F%98%80" * 500,
    "/v1/models/sql-adapter:" + "9" * 5000,
    "/%ED%A0%80",
    "/" + "y" * 7000,
    "/v1/completions/%00",
    "//",
    "/?" + "a=b&" * 1000,
)


async def test_any_path_and_method_is_answered_below_500(fleet: Any) -> None:
    for method in ("GET", "POST", "HEAD", "DELETE", "OPTIONS", "PATCH"):
        for path in PATHS:
            head = f"{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
            reader, writer = await asyncio.open_connection("127.0.0.1", int(fleet.url.rpartition(":")[2]))
            writer.write(head.encode())
            answer = await reader.read()
            writer.close()
            await writer.wait_closed()
            assert 200 <= int(answer.split()[1]) < 500, (method, path[:50], answer[:300])
            assert len(answer) < 2500, (method, path[:50])
