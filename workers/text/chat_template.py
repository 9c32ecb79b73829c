"""Chat templates: messages to a prompt's text, as transformers' ``apply_chat_template`` renders them.

Owns: the variables of a template, and where a message that is to be continued ends. Leaves to others: messages
(messages.py), the sandbox and its limits (template_sandbox.py), reading files (files.py), tokenising the result (with
``add_special_tokens=False``, since a template writes its own).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import jinja2
from jinja2 import nodes

from lorafleet.workers.errors import InvalidRequestError, ModelError, cut, quoted
from lorafleet.workers.text.messages import TemplateForm, given, template_messages
from lorafleet.workers.text.template_filters import formatted
from lorafleet.workers.text.template_kwargs import check_template_kwargs
from lorafleet.workers.text.template_sandbox import Budget, Environment
from lorafleet.workers.text.tokenizer import Tokenizer
from lorafleet.workers.text.traced_text import TracedText, content_of, join_texts

MAX_TEMPLATE_CHARS: Final = 128 << 10
"""Length of a template. The longest published ones have some 30,000 characters; compiling takes 10 µs per character."""

_TAG: Final = f"x{secrets.token_hex(8)}c"  # put after the text to continue; ends with a space, as transformers' does


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
        return self._default is not None and self._default.form.accepts_parts

    @property
    def takes_tools(self) -> bool:
        """Return whether the template for requests with tools reads them."""
        return self._tool_use is not None and self._tool_use.takes_tools

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        *,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **special_tokens: str,
    ) -> TracedText:
        """Return the prompt's text, in which everything but the template's own text and the special tokens is traced.

        messages: OpenAI messages, see `template_messages`. continue_final_message: the prompt ends where the last
        message's content does. add_generation_prompt: it ends with the head of a new message; None: unless the last one
        is continued. chat_template_kwargs: a request's further variables. special_tokens: the tokenizer's.

        Raises InvalidRequestError: no template, no messages, what `template_messages` and `check_template_kwargs`
        refuse, an error raised by the template, or a limit it exceeds.
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
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt are both true. A message is either continued or "
                "begun: set add_generation_prompt to false.",
                param="continue_final_message",
            )
        read = template_messages(messages, compiled.form)
        final = _mark_end(messages[-1], read[-1]) if continue_final_message else ""
        text = compiled.render(
            {name: token for name, token in special_tokens.items() if token is not None}
            | {name: given(value) for name, value in check_template_kwargs(chat_template_kwargs or {}).items()}
            | {
                "messages": read,
                "tools": given(tools, "tools"),
                "documents": given(documents, "documents"),
                "add_generation_prompt": (
                    not continue_final_message if add_generation_prompt is None else add_generation_prompt
                ),
            }
        )
        return _until_mark(text, final) if continue_final_message else text


def _mark_end(sent: Mapping[str, Any], message: dict[str, Any]) -> str:
    """Put the tag after a message's content. Return the text that it ends. sent: the message as the request has it."""
    content = None if sent.get("content") in (None, []) else message["content"]
    if isinstance(content, list):
        text: str = content[-1]["text"]
        content[-1]["text"] = TracedText(f"{text}{_TAG} ")
        return text
    if not isinstance(content, str):
        raise InvalidRequestError(
            "continue_final_message is true, but the last message has no content to continue.", param="messages"
        )
    message["content"] = TracedText(f"{content}{_TAG} ")
    return content


def _until_mark(text: TracedText, final: str) -> TracedText:
    """Return the prompt up to the tag. final: the text before the tag.

    A template that trims the tag's space trims the ends of messages, so the prompt ends without spaces too.
    """
    place = text.rfind(_TAG)
    if place < 0 or final.strip() not in text:
        raise InvalidRequestError(
            "continue_final_message is true, but the model's chat template leaves out or changes the last message's "
            f"content, {quoted(final)}. Send it in the form that the template prints.",
            param="continue_final_message",
        )
    end = place + len(_TAG)
    return text[:place] if text[end : end + 1] == " " else text[:place].rstrip()


class _Compiled:
    """One compiled template."""

    def __init__(self, source: str, now: Callable[[], datetime]) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ModelError(f"The chat template has {len(source):,} characters; the limit is {MAX_TEMPLATE_CHARS:,}.")
        environment = Environment()
        environment.globals["strftime_now"] = lambda format: formatted(format, now().strftime, format)
        try:
            tree = environment.parse(source)
            self.form = _form(tree)
            self.takes_tools = any(node.name == "tools" for node in tree.find_all(nodes.Name))
            self._template = environment.compile_bounded(tree)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"The chat template does not compile: {cut(error.message or '')} (line {error.lineno})."
            ) from error
        except Exception as error:  # from jinja2, or from Python compiling jinja2's output
            raise ModelError(f"The chat template does not compile: {cut(str(error))}.") from error

    def render(self, variables: dict[str, Any]) -> TracedText:
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
        text = join_texts(pieces)
        return TracedText(text, content_of(text))


def _form(tree: nodes.Template) -> TemplateForm:
    """Return what a template reads, by what it does with content and which roles it names."""
    accepts_parts = _goes_over_content(tree)
    tests_kind = any(test.name in ("string", "sequence", "iterable", "mapping") for test in tree.find_all(nodes.Test))
    has_developer = any(const.value == "developer" for const in tree.find_all(nodes.Const))
    return TemplateForm(accepts_parts, accepts_parts and not tests_kind, has_developer)


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
