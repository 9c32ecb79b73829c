"""Chat templates: messages to a prompt's text, as transformers' ``apply_chat_template`` renders them.

Owns: OpenAI content parts and the variables of a template. Leaves to others: the sandbox and its limits
(template_sandbox.py), reading files (files.py), tokenising the result (with ``add_special_tokens=False``, since a
template writes its own).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import jinja2
from jinja2 import nodes

from lorafleet.workers.errors import InvalidRequestError, ModelError, cut, quoted
from lorafleet.workers.text.json_shape import MAX_DEPTH, check_shape
from lorafleet.workers.text.template_sandbox import Budget, Environment
from lorafleet.workers.text.tokenizer import Tokenizer

MAX_TEMPLATE_CHARS: Final = 128 << 10
"""Length of a template. The longest published ones have some 30,000 characters; compiling takes 10 µs per character."""

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A model's chat template, compiled once; rendering is thread-safe.

    accepts_parts: the template iterates over the parts of a content list; otherwise lists are flattened for it.
    """

    def __init__(self, source: str | Mapping[str, str] | None, *, now: Callable[[], datetime] = datetime.now) -> None:
        """source: jinja2 text; or several templates by name, of which "default" is used, and "tool_use", if present,
        for requests with tools; or None or empty, and `render` raises. now: the clock of ``strftime_now``.

        Raises ModelError for a template that does not compile.
        """
        sources = {"default": source} if isinstance(source, str) else dict(source or {})
        if sources and "default" not in sources:
            raise ModelError(f'None of the model\'s chat templates is called "default"; there are {sorted(sources)}.')
        self._default = _Compiled(sources["default"], now) if sources else None
        self._tool_use = _Compiled(sources["tool_use"], now) if "tool_use" in sources else self._default

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """Return the template among a tokenizer's files."""
        return cls(tokenizer.chat_templates)

    @property
    def exists(self) -> bool:
        """Return whether the model has a template."""
        return self._default is not None

    @property
    def accepts_parts(self) -> bool:
        """Return whether content lists reach the (default) template as lists."""
        return self._default is not None and self._default.accepts_parts

    @property
    def takes_tools(self) -> bool:
        """Return whether the template for requests with tools reads them."""
        return self._tool_use is not None and self._tool_use.takes_tools

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        bos_token: str | None = None,
        eos_token: str | None = None,
        **extra: Any,
    ) -> str:
        """Return the prompt's text.

        messages: OpenAI messages of plain JSON values. A key whose value is null counts as absent. Content may be a
        list of ``{"type": "text", "text": ...}``; a template for plain strings gets the texts joined by newlines. JSON
        text in a tool call's ``arguments`` is parsed, as templates expect. extra: further variables, such as the other
        special tokens and a request's ``chat_template_kwargs``.

        Raises InvalidRequestError: no template, no messages, a content part that is not text, an error raised by the
        template, or a limit it exceeds.
        """
        compiled = self._default if tools is None else self._tool_use
        if compiled is None:
            raise InvalidRequestError(
                "This model has no chat template, so it cannot take messages. Send the text of a prompt to "
                "/v1/completions instead, or give the model a chat_template.jinja.",
                param="messages",
            )
        if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
            raise InvalidRequestError(f"messages is {quoted(messages)}; it must be a list.", param="messages")
        if not messages:
            raise InvalidRequestError("There must be at least one message.", param="messages")
        variables = {"bos_token": bos_token, "eos_token": eos_token}
        variables = {name: token for name, token in variables.items() if token is not None} | {"documents": None}
        return compiled.render(
            variables
            | {name: _plain(value) for name, value in extra.items()}
            | {
                "messages": [_message(message, number, compiled) for number, message in enumerate(messages)],
                "tools": _plain(tools),
                "add_generation_prompt": add_generation_prompt,
            }
        )


class _Compiled:
    """One compiled template. wants_parts: it takes only content lists."""

    def __init__(self, source: str, now: Callable[[], datetime]) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ModelError(f"The chat template has {len(source):,} characters; the limit is {MAX_TEMPLATE_CHARS:,}.")
        environment = Environment()
        environment.globals["strftime_now"] = lambda format: now().strftime(format)
        try:
            tree = environment.parse(source)
            self.accepts_parts = _goes_over_content(tree)
            self.wants_parts = self.accepts_parts and not any(
                test.name in ("string", "sequence", "iterable", "mapping") for test in tree.find_all(nodes.Test)
            )
            self.takes_tools = any(node.name == "tools" for node in tree.find_all(nodes.Name))
            self._template = environment.compile_bounded(tree)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"The chat template does not compile: {cut(error.message or '')} (line {error.lineno})."
            ) from error
        except Exception as error:  # from jinja2, or from Python compiling jinja2's output
            raise ModelError(f"The chat template does not compile: {cut(str(error))}.") from error

    def render(self, variables: dict[str, Any]) -> str:
        budget = Budget()
        pieces: list[str] = []
        try:
            for piece in self._template.generate(variables | budget.variables()):
                budget.write(piece)
                pieces.append(piece)
        except Exception as error:  # a template's expressions can raise anything
            reason = cut(str(error)) or type(error).__name__
            raise InvalidRequestError(
                f"The model's chat template cannot render these messages: {reason}", param="messages"
            ) from error
        return "".join(pieces)


def _goes_over_content(tree: nodes.Template) -> bool:
    """Return whether a loop runs over a message's ``content`` (directly, through filters, or through a variable)."""
    names = {"content"}

    def is_content(node: nodes.Node) -> bool:
        while isinstance(node, nodes.Filter) and node.node is not None:
            node = node.node
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        return (isinstance(node, nodes.Getattr) and node.attr == "content") or (
            isinstance(node, nodes.Name) and node.name in names
        )

    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and is_content(assign.node):
            names.add(assign.target.name)
    return any(is_content(loop.iter) for loop in tree.find_all(nodes.For))


def _message(message: Mapping[str, Any], number: int, compiled: _Compiled) -> dict[str, Any]:
    """Convert one message to what templates expect: plain values, absent instead of null, content as text or parts."""
    if not isinstance(message, Mapping):
        raise InvalidRequestError(
            f"Message {number} must be an object, not {type(message).__name__}.", param="messages"
        )
    plain = {key: _plain(value) for key, value in message.items() if value is not None}
    content = plain.get("content")
    if isinstance(content, list):
        texts = [_part_text(part, number) for part in content]
        if not compiled.accepts_parts:
            plain["content"] = "\n".join(texts)
    elif isinstance(content, str) and compiled.wants_parts:
        plain["content"] = [{"type": "text", "text": content}]
    elif content is not None and not isinstance(content, str):
        raise InvalidRequestError(
            f"The content of message {number} must be a string or a list of parts, not {type(content).__name__}.",
            param="messages",
        )
    if "tool_calls" in plain:
        plain["tool_calls"] = _parse_arguments(plain["tool_calls"])
    reasoning = next((plain[field] for field in _REASONING_FIELDS if field in plain), None)
    if reasoning is not None:  # templates use different names for it
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _part_text(part: Any, number: int) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise InvalidRequestError(
            f"A content part of message {number} has the type {quoted(kind)}; this model takes only parts of the form "
            '{"type": "text", "text": "..."}.',
            param="messages",
        )
    text: str = part["text"]
    return text


def _parse_arguments(tool_calls: Any) -> Any:
    """Parse the calls' arguments, JSON text in OpenAI's API, to the objects templates print. Other text stays."""
    for call in tool_calls if isinstance(tool_calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            text = function["arguments"] or "{}"
            check_shape(text.encode(errors="replace"), "The arguments of a tool call", param="messages")
            try:
                arguments = json.loads(text)
            except ValueError:
                continue
            if isinstance(arguments, dict):
                function["arguments"] = arguments
    return tool_calls


def _plain(value: Any, depth: int = 0) -> Any:
    """Return a fresh copy of pure JSON types, so that a template gets no object with our methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth == MAX_DEPTH:
        raise InvalidRequestError(f"messages are nested too deep; the limit is {MAX_DEPTH}.", param="messages")
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        return [_plain(item, depth + 1) for item in value]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    raise InvalidRequestError(
        f"A value for the chat template must be plain JSON, not {type(value).__name__}.", param="messages"
    )
