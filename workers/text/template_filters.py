"""Filters of chat templates that mix texts, and say of each character of the result whether it is a request's.

jinja2's own return plain strings, which would count as the template's. Owns: their result. Leaves to others: its size
(template_sandbox.py), tracing (traced_text.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

import jinja2
from jinja2.filters import make_attrgetter
from jinja2.utils import pass_environment

from lorafleet.workers.text.traced_text import TracedText, content_of, has_content, text_of, written


def formatted(layout: str, write: Callable[..., str], *values: Any, **named: Any) -> str:
    """Return what a format function writes of values. All of it is the request's if the layout is."""
    return TracedText(write(*values, **named)) if content_of(layout) else written(write, *values, **named)


def percent(layout: str, values: Any) -> str:
    """Compute ``layout % values``."""
    if not content_of(layout) and not has_content(values):
        return str.__mod__(layout, values)
    if isinstance(values, tuple):
        return formatted(layout, lambda *items: str.__mod__(layout, items), *values)
    return formatted(layout, lambda item: str.__mod__(layout, item), values)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write plain JSON; jinja2's own filter escapes HTML."""

    def write(value: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    text = written(write, value)
    return TracedText(text) if has_content((indent, separators)) else text


@pass_environment
def _join(environment: jinja2.Environment, value: Any, d: Any = "", attribute: str | int | None = None) -> str:
    """Join texts with a separator."""
    values = value if attribute is None else map(make_attrgetter(environment, attribute), value)
    separator = text_of(d)
    return TracedText(separator, content_of(separator)).join(map(text_of, values))


def _replace(s: Any, old: Any, new: Any, count: int | None = None) -> str:
    """Replace a part of a text by another."""
    text = text_of(s)
    return TracedText(text, content_of(text)).replace(text_of(old), text_of(new), -1 if count is None else count)


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    """Compute ``value % args``, or with named values."""
    if args and kwargs:
        raise jinja2.TemplateError("format takes values by position or by name, not both")
    return percent(text_of(value), kwargs or args)


TRACING_FILTERS: Final[dict[str, Callable[..., Any]]] = {
    "format": _format,
    "join": _join,
    "replace": _replace,
    "string": text_of,
    "tojson": _tojson,
}
