"""Chat templates: messages to the text of a prompt, as transformers' ``apply_chat_template`` renders them.

Owns: the sandbox, its helpers and its bounds, OpenAI content parts. Leaves to others: reading files (tokenizer.py),
tokenising the result (with ``add_special_tokens=False``: a template writes its own).

A template is a program that came with a model or an adapter. What bounds it:

* jinja2's sandbox: no attribute that leads to the interpreter, no change of a value it was given, no file, no include;
  ``range`` is limited to 100,000.
* Steps: every turn of a loop and every macro call counts towards `MAX_STEPS`; recursion ends at Python's limit.
* Size: the prompt is given up as soon as it passes `MAX_PROMPT_CHARS`; ``*`` and ``**`` refuse operands that would
  build something larger.

Between two steps a filter still works on whole values: a template that sets out to fill memory (by doubling a string
with ``~``) can. So templates are taken from model and adapter directories, which an operator chose, never from a
request.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from lorafleet.workers.errors import InvalidRequestError, ModelError, cut, quoted
from lorafleet.workers.text.json_shape import MAX_DEPTH, check_shape
from lorafleet.workers.text.tokenizer import Tokenizer

MAX_STEPS: Final = 1_000_000
"""Loop turns and macro calls of one rendering: a chat of 700 messages through a template that is quadratic in them."""

MAX_PROMPT_CHARS: Final = 16_000_000
"""Length of a rendered prompt: some 4 million tokens."""

_STEP = "_lorafleet_step"  # the counter's name inside templates
_NUM_BITS_LIMIT = 1 << 16  # of an integer that a template computes
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A model's chat template, compiled once; rendering is safe from several threads.

    accepts_parts: the template goes over the parts of a content list itself; if not, lists are flattened for it.
    """

    def __init__(self, source: str | Mapping[str, str] | None, *, now: Callable[[], datetime] = datetime.now) -> None:
        """source: jinja2 text; or several by name, of which "default" is used ("tool_use", if there is one, for
        requests with tools); or None or nothing, and `render` says so. now: the clock of ``strftime_now``.

        Raises ModelError for a template that does not compile.
        """
        sources = {"default": source} if isinstance(source, str) else dict(source or {})
        if sources and "default" not in sources:
            raise ModelError(f'None of the model\'s chat templates is called "default": there are {sorted(sources)}.')
        self._default = _Compiled(sources["default"], now) if sources else None
        self._tool_use = _Compiled(sources["tool_use"], now) if "tool_use" in sources else self._default

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The template among a tokenizer's files."""
        return cls(tokenizer.chat_templates)

    @property
    def exists(self) -> bool:
        """Whether the model has a template at all."""
        return self._default is not None

    @property
    def accepts_parts(self) -> bool:
        """Whether content lists reach the (default) template as lists."""
        return self._default is not None and self._default.accepts_parts

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        bos_token: str | None = None,
        eos_token: str | None = None,
        **extra: Any,
    ) -> str:
        """The prompt's text.

        messages: OpenAI messages of plain JSON values. A key whose value is null counts as absent. Content may be a
        list of ``{"type": "text", "text": ...}``; a template for plain strings gets the texts joined by newlines.
        JSON text in a tool call's ``arguments`` is parsed, as templates expect. extra: further variables, such as the
        other special tokens and a request's ``chat_template_kwargs``.

        Raises InvalidRequestError: no template, no messages, a content part that is not text, whatever the template
        raises, or one that passes its bounds.
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
    """One compiled template. wants_parts: it takes nothing but content lists."""

    def __init__(self, source: str, now: Callable[[], datetime]) -> None:
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda format: now().strftime(format),
            "namespace": _TemplateNamespace,
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        }
        try:
            tree = environment.parse(source)
            self.accepts_parts = _goes_over_content(tree)
            self.wants_parts = self.accepts_parts and not any(
                test.name in ("string", "sequence", "iterable", "mapping") for test in tree.find_all(nodes.Test)
            )
            _count_steps(tree, environment)
            self._template = environment.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"The chat template does not compile: {error.message} (line {error.lineno}).") from error
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelError(f"The chat template does not compile: {error}.") from error

    def render(self, variables: dict[str, Any]) -> str:
        num_chars = num_steps = 0
        pieces: list[str] = []

        def step() -> None:
            nonlocal num_steps
            num_steps += 1
            if num_steps > MAX_STEPS:
                raise SecurityError(f"it took more than {MAX_STEPS:,} steps")

        try:
            for piece in self._template.generate(variables | {_STEP: step}):
                num_chars += len(piece)
                if num_chars > MAX_PROMPT_CHARS:
                    raise SecurityError(f"the prompt would be longer than {MAX_PROMPT_CHARS:,} characters")
                pieces.append(piece)
        except Exception as error:  # a template can raise anything that its expressions can
            reason = cut(str(error)) or type(error).__name__
            raise InvalidRequestError(
                f"The model's chat template cannot render these messages: {reason}", param="messages"
            ) from error
        return "".join(pieces)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a bound on what multiplication and powers may build."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Check the operands' sizes, then compute."""
        if isinstance(left, int) and isinstance(right, int):
            factor = abs(right) if operator == "**" else 1
            if left.bit_length() * factor + right.bit_length() > _NUM_BITS_LIMIT:
                raise SecurityError(f"{operator} would give a number of more than {_NUM_BITS_LIMIT:,} bits")
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                repeats = isinstance(value, (str, list, tuple)) and isinstance(times, int)
                if repeats and len(value) * times > MAX_PROMPT_CHARS:
                    raise SecurityError(f"* would give something longer than {MAX_PROMPT_CHARS:,}")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}`` marks what training learns from; here it only renders its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance's)

    def parse(self, parser: Parser) -> nodes.Node:
        """A scope of its own, as transformers has it."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _TemplateNamespace(Namespace):
    """jinja2's namespace without underscore names, which could stand in for Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no parameter names, so that namespace(self=1) works
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a namespace may not have a name that begins with an underscore: {name!r}")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _count_steps(tree: nodes.Template, environment: jinja2.Environment) -> None:
    """Put a call of the step counter at the head of every loop and macro body."""
    blocks: list[nodes.For | nodes.Macro | nodes.CallBlock] = [
        *tree.find_all(nodes.For),
        *tree.find_all(nodes.Macro),
        *tree.find_all(nodes.CallBlock),
    ]
    for node in blocks:
        call = nodes.Call(nodes.Name(_STEP, "load"), [], [], None, None)
        statement = nodes.ExprStmt(call).set_lineno(node.lineno).set_environment(environment)
        node.body.insert(0, statement)


def _goes_over_content(tree: nodes.Template) -> bool:
    """Whether a loop runs over a message's ``content`` (directly, through filters, or through a variable)."""
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
    """One message as templates expect it: plain values, absent instead of null, content as text or parts."""
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
    if reasoning is not None:  # templates read it under different names
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
    """OpenAI sends a call's arguments as JSON text; templates print them as an object. Other text stays as it is."""
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
    """A fresh copy made of JSON's types alone, so that a template meets no object with methods of ours."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth == MAX_DEPTH:
        raise InvalidRequestError(f"messages are nested deeper than {MAX_DEPTH}, the limit.", param="messages")
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
