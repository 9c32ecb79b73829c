"""The messages of a request: what every template needs of them, and their prompt.

Owns: checks before a request takes its place at a model, the token ids. Leaves to others: the form a template wants
(workers/text/messages.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorafleet.controller.gateway.api.schema import ChatRequest, TokenizeRequest
from lorafleet.controller.gateway.api.served_model import ServedModel
from lorafleet.workers.answers.call_syntax import CallSyntax, PythonicSyntax
from lorafleet.workers.errors import InvalidRequestError, quoted
from lorafleet.workers.text.messages import ROLES, content_text


def check_messages(messages: Sequence[dict[str, Any]]) -> None:
    """Raises InvalidRequestError for a message without a known role, or without content that its role needs."""
    if not messages:
        raise InvalidRequestError("messages is empty; there must be at least one message.", param="messages")
    for number, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES and role != "function":  # the old name of a tool
            shown = quoted(role) if isinstance(role, str) else type(role).__name__
            raise InvalidRequestError(
                f"messages[{number}].role is {shown}; it must be one of {', '.join(ROLES)}.", param="messages"
            )
        if role not in ("assistant", "function") and message.get("content") is None:
            raise InvalidRequestError(f"messages[{number}].content is missing.", param="messages")


def encode_messages(
    model: ServedModel,
    messages: Sequence[dict[str, Any]],
    fields: ChatRequest | TokenizeRequest,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    call_syntax: CallSyntax | PythonicSyntax | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    parse_special_in_content: bool,
    max_tokens: int | None,
) -> list[int]:
    """Return the token ids of messages in the model's template. max_tokens: see `Tokenizer.encode`.

    Raises the errors of `ModelText.encode_chat`.
    """
    return model.text.encode_chat(
        messages,
        add_generation_prompt=fields.add_generation_prompt,
        continue_final_message=fields.continue_final_message is True,
        documents=fields.documents,
        tools=tools,
        call_syntax=call_syntax,
        chat_template_kwargs={**(template_kwargs or {}), **(fields.chat_template_kwargs or {})},
        add_special_tokens=fields.add_special_tokens is True,
        parse_special_in_content=parse_special_in_content,
        max_tokens=max_tokens,
    )


def answer_role(fields: ChatRequest) -> str:
    """Return the role of the answer: the last message's, unless the prompt begins a new one."""
    goes_on = fields.continue_final_message is True or fields.add_generation_prompt is False
    return str(fields.messages[-1]["role"]) if goes_on else "assistant"


def echo_of(fields: ChatRequest) -> str:
    """Return what an answer with `echo` begins with: the last message's text, if the answer has the same role."""
    last = fields.messages[-1]
    return content_text(last.get("content") or "") if fields.echo and last["role"] == answer_role(fields) else ""
