"""The fields of requests that are honoured: one struct for each endpoint.

Owns: fields and types. Leaves to others: reading them (body.py), what becomes of a field that is missing here
(field_rule.py), ranges (workers/params.py, workers/scheduling/request.py), combinations of fields (sampling.py,
completions.py, chat.py).
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from lorafleet.workers.errors import InvalidRequestError

MAX_FIELD_BYTES: Final = 1 << 17  # of any field except those that carry the request's content
SIZEABLE: Final = frozenset({"prompt", "messages", "documents", "tokens", "tools"})


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
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None


class StreamOptions(msgspec.Struct, kw_only=True):
    """include_usage: a last chunk with the usage and no choices. continuous_usage_stats: with it, the usage so far in
    every chunk."""

    include_usage: bool | None = None
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

    model: None, or empty, is the base model. priority: lower is served earlier; it is added to the tenant's.
    cache_salt: only requests of the same tenant with the same salt share cached prefixes. adapters: applied together;
    `model` is the base model then. request_id: the answer's id; the header `x-request-id` comes before it. The others
    are explained where they are used: scoring.py, beam_search.py, truncation.py, logprobs.py, structured.py.
    """

    model: str | None = None
    max_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    add_special_tokens: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    adapters: list[ComposedAdapter] | None = None
    request_id: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    best_of: int | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None


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
    """POST /v1/chat/completions. echo: the answer begins with the last message if both have the same role. tool_choice:
    see `tool_use`."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
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
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
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
"""Fields that do not affect the answer, whatever their value; even `--strict-fields` ignores them."""


def check_stream_options(fields: GenerateFields) -> None:
    """Raises InvalidRequestError for stream options that do not fit the request."""
    options = fields.stream_options
    if options is None:
        return
    if not fields.stream:
        raise InvalidRequestError("stream_options needs stream to be true.", param="stream_options")


def wants_usage(fields: GenerateFields) -> bool:
    """Return whether a stream ends with a chunk that has the usage."""
    return fields.stream_options is not None and bool(fields.stream_options.include_usage)


def wants_continuous_usage(fields: GenerateFields) -> bool:
    """Return whether every chunk of a stream has the usage so far."""
    return wants_usage(fields) and bool(fields.stream_options and fields.stream_options.continuous_usage_stats)
