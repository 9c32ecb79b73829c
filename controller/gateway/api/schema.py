"""The fields of requests: one struct for each endpoint, and what else is accepted, or refused by name.

Owns: fields and types; JSON is read only here. Leaves to others: ranges (workers/params.py,
workers/scheduling/request.py), combinations of fields (sampling.py, completions.py, chat.py).

A field missing here would change the answer if it were honoured, so it is refused by name, unless its value asks for
nothing (null, or the default). msgspec decodes strictly: true is not a number, 1.0 is not an integer, and JSON has no
NaN. The number of elements in a body is checked before it is decoded.
"""

from __future__ import annotations

import contextlib
import functools
import re
from typing import Any, Final, TypeVar

import msgspec

from lorafleet.workers.errors import InvalidRequestError, cut, quoted
from lorafleet.workers.text.json_shape import check_shape

MAX_FIELD_BYTES: Final = 1 << 17  # of any field except those that carry the request's content
SIZEABLE: Final = frozenset({"prompt", "messages", "tokens", "tools"})
_MAX_DEFAULT_BYTES = 256  # longer than any value of `DEFAULTS`


class SamplingFields(msgspec.Struct, kw_only=True):
    """Fields of completions and chat, with the names and meaning of `SamplingParams`. None: not given."""

    n: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """include_usage: a last chunk with the usage and no choices."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # false is this server's behaviour
    continuous_usage_stats: bool | None = None


class ComposedAdapter(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One of several adapters of a request."""

    name: str
    weight: float = 1.0


class JsonSchemaFormat(msgspec.Struct, kw_only=True):
    """`response_format.json_schema`. strict: every keyword of the schema must be one that can be enforced."""

    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """OpenAI's `response_format`, and vLLM's structural tags. schema: for json_object, as llama.cpp takes it."""

    type: str
    json_schema: JsonSchemaFormat | None = None
    schema: dict[str, Any] | bool | None = None
    format: dict[str, Any] | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """vLLM's `structured_outputs`, see `StructuredOutputsParams`."""

    json: dict[str, Any] | str | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: dict[str, Any] | str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False


class GenerateFields(SamplingFields, kw_only=True):
    """Fields of completions and chat besides sampling.

    priority: lower is served earlier; it is added to the tenant's. cache_salt: only requests of the same tenant with
    the same salt share cached prefixes. adapters: applied together; `model` is the base model then.
    """

    model: str
    max_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    add_special_tokens: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    adapters: list[ComposedAdapter] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None


class CompletionRequest(GenerateFields, kw_only=True):
    """POST /v1/completions. prompt: a text, texts, token ids, or lists of token ids (prompts.py)."""

    prompt: msgspec.Raw
    echo: bool | None = None
    logprobs: int | None = None


class Function(msgspec.Struct, kw_only=True):
    """A function that an answer may call. parameters: a JSON schema. strict: its arguments must fit them."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    """A tool. type: "function"."""

    type: str = "function"
    function: Function


class ChatRequest(GenerateFields, kw_only=True):
    """POST /v1/chat/completions. tool_choice: see `tool_use`."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    reasoning_effort: str | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


class LoadAdapterBody(msgspec.Struct, kw_only=True):
    """POST /v1/load_lora_adapter. lora_path: a directory on the workers or a hub id."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False  # replace the adapter that has this name
    weight: float | None = None  # its share of service among a tenant's adapters; by default 1
    pin: bool = False  # keep it in a device slot


class UnloadAdapterBody(msgspec.Struct, kw_only=True):
    """POST /v1/unload_lora_adapter."""

    lora_name: str


ASKS_NOTHING: Final = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})
"""Fields that do not affect the answer, whatever their value."""

DEFAULTS: Final[dict[str, tuple[object, ...]]] = {
    "add_generation_prompt": (True,),
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "early_stopping": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "is_3d_lora_weight": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "lora_int_id": (),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of OpenAI or vLLM that this server does not honour: the values, besides null, that ask for nothing."""

INSTEAD: Final = {
    "function_call": "Send tool_choice instead.",
    "functions": "Send them as tools instead.",
}
"""Fields of `DEFAULTS` that another one has replaced."""

_T = TypeVar("_T", bound=msgspec.Struct)
_WHERE = re.compile(r" - at `\$(?:\.([A-Za-z_0-9]+))?(.*)`$")


def decode(body: bytes, kind: type[_T]) -> _T:
    """Decode a request's body. Raises InvalidRequestError that names the field."""
    _check_shape(body, kind)
    fields = _decode(body, dict[str, msgspec.Raw])
    known = kind.__struct_fields__
    for name, raw in fields.items():
        num_bytes = memoryview(raw).nbytes
        if name in known:
            if num_bytes > MAX_FIELD_BYTES and name not in SIZEABLE:
                raise InvalidRequestError(f"{name} has {num_bytes} bytes; the limit is {MAX_FIELD_BYTES}.", param=name)
        elif name not in ASKS_NOTHING and (num_bytes > _MAX_DEFAULT_BYTES or not _asks_nothing(name, bytes(raw))):
            does = "is not supported by this server" if name in DEFAULTS else "is not a known field"
            instead = INSTEAD.get(name, "Leave it out.")
            raise InvalidRequestError(f"{quoted(name)} {does}. {instead}", param=cut(name))
    request: _T = _decode(body, kind)
    return request


def decode_field(raw: bytes, kind: Any, name: str) -> Any:
    """Decode the value of one field, or of a part of it. Raises InvalidRequestError that names the field."""
    return _decode(raw, kind, name)


def _check_shape(body: bytes, kind: type[msgspec.Struct]) -> None:
    try:
        check_shape(body, "The body")
    except InvalidRequestError as error:
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            parts = msgspec.json.decode(body, type=_parts_of(kind))  # leaves the fields undecoded
            for name in kind.__struct_fields__:
                check_shape(bytes(getattr(parts, name)), name, param=name)
        raise error


@functools.cache
def _parts_of(kind: type[msgspec.Struct]) -> type[msgspec.Struct]:
    """Return `kind` with all of its fields left as raw JSON."""
    return msgspec.defstruct(
        f"{kind.__name__}Parts", [(name, msgspec.Raw, msgspec.Raw(b"")) for name in kind.__struct_fields__]
    )


def _asks_nothing(name: str, raw: bytes) -> bool:
    value = _decode(raw, object)
    return value is None or any(
        value == default and isinstance(value, bool) == isinstance(default, bool) for default in DEFAULTS.get(name, ())
    )


def _decode(body: bytes, kind: Any, name: str | None = None) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error), name) from None
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}.") from None
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"The body is not UTF-8: {error.reason} at byte {error.start}.") from None
    except RecursionError:
        raise InvalidRequestError("The body is nested too deeply.") from None


def _explain(problem: str, root: str | None) -> InvalidRequestError:
    """Return msgspec's message in our words. It contains only types, places and unknown names of the body."""
    where = _WHERE.search(problem)
    detail = problem[: where.start()] if where else problem
    detail = cut(detail.replace(" | null", "")).rstrip(".")
    name = where.group(1) if where else None
    place = where.group(2) if where else ""
    if root is not None:
        return InvalidRequestError(f"{root}{place}: {detail[0].lower()}{detail[1:]}.", param=root.partition("[")[0])
    if name is not None:
        return InvalidRequestError(f"{name}{place}: {detail[0].lower()}{detail[1:]}.", param=name)
    missing = re.match(r"Object missing required field `(\w+)`", detail)
    if missing:
        return InvalidRequestError(f"{missing.group(1)!r} is required.", param=missing.group(1))
    return InvalidRequestError(f"The body does not fit: {detail[0].lower()}{detail[1:]}.")


def check_stream_options(fields: GenerateFields) -> None:
    """Raises InvalidRequestError for stream options that do not fit the request."""
    options = fields.stream_options
    if options is None:
        return
    if not fields.stream:
        raise InvalidRequestError("stream_options needs stream to be true.", param="stream_options")
    for name in ("include_obfuscation", "continuous_usage_stats"):
        if getattr(options, name):
            raise InvalidRequestError(f"stream_options.{name} is not supported. Leave it out.", param="stream_options")


def wants_usage(fields: GenerateFields) -> bool:
    """Return whether a stream ends with a chunk that has the usage."""
    return fields.stream_options is not None and bool(fields.stream_options.include_usage)
