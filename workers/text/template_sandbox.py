"""The sandbox of chat templates: jinja2's, plus limits on the work and the memory of one rendering.

A template is a program that came with a model or an adapter. It is limited by:

* jinja2's sandbox: no attribute that leads to the interpreter, no change of a given value, no file, no include;
  ``range`` is limited to 100,000.
* Steps and time: every loop turn and every macro call is counted and checks the clock; recursion ends at Python's
  limit.
* Size: everything built by operators, filters and methods is added up, and checked in advance where a few characters
  can produce much. Filters and methods that cannot be counted, and that no chat template needs, are removed.

Text of a request stays traced (traced_text.py) through all of these. Where an operation's result cannot be traced, all
of it counts as the request's.

Owns: the environment and the budget. Leaves to others: a template's variables (chat_template.py).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Final, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from lorafleet.workers.text.template_filters import TRACING_FILTERS, formatted, percent
from lorafleet.workers.text.traced_text import TracedText, content_of, has_content, join_texts, text_of

MAX_STEPS: Final = 1_000_000
"""Loop turns and macro calls per rendering: enough for 700 messages in a template quadratic in them."""

MAX_PROMPT_CHARS: Final = 16_000_000
"""Length of a rendered prompt, some 4 million tokens, and of any value that a template builds."""

MAX_BUILT_CHARS: Final = 256_000_000
"""Total built during one rendering, including what it discards."""

MAX_RENDER_S: Final = 10.0
"""CPU time per rendering."""

BUDGET: Final = "_lorafleet_budget"
"""The variable that holds a rendering's `Budget`."""

_STEP, _JOIN = "_lorafleet_step", "_lorafleet_join"
_RESERVED = "_lorafleet"
_NUM_BITS_LIMIT = 1 << 16  # bits of an integer that a template computes
_ITEM_CHARS = 8  # size counted for a list item
_MAX_WIDTH = 10_000  # maximum width of padding or indentation
_NO_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
_NO_METHODS = frozenset(
    {"encode", "expandtabs", "format_map", "from_bytes", "fromhex", "maketrans", "to_bytes", "translate"}
)
_WIDE = re.compile(r"\d{5}|:[^{}]*\{|%[^%a-zA-Z]*\*")  # widths in formats: large ones, and ones from arguments
_PAD_METHODS = frozenset({"center", "ljust", "rjust", "zfill"})


class LimitError(SecurityError):
    """A template exceeded a limit of a rendering."""


class Budget:
    """The resources one rendering has used."""

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self._clock = clock
        self._end = clock() + MAX_RENDER_S
        self._num_steps = 0
        self._num_built = 0
        self._num_written = 0

    def variables(self) -> dict[str, Any]:
        """Return the variables a compiled template refers to."""
        return {BUDGET: self, _STEP: self.step, _JOIN: self.join}

    def step(self) -> None:
        self._num_steps += 1
        if self._num_steps > MAX_STEPS:
            raise LimitError(f"it took more than {MAX_STEPS:,} steps")
        if self._clock() > self._end:
            raise LimitError(f"it took more than {MAX_RENDER_S:g} s")

    def write(self, piece: str) -> None:
        """Count a part of the prompt."""
        self._num_written += len(piece)
        if self._num_written > MAX_PROMPT_CHARS:
            raise LimitError(f"the prompt would be longer than {MAX_PROMPT_CHARS:,} characters")

    def take(self, num_chars: int) -> None:
        """Count a value of this size that is about to be built, or was just built."""
        self._num_built += num_chars
        if num_chars > MAX_PROMPT_CHARS:
            raise LimitError(f"it would build something longer than {MAX_PROMPT_CHARS:,} characters")
        if self._num_built > MAX_BUILT_CHARS:
            raise LimitError(f"it built more than {MAX_BUILT_CHARS:,} characters in all")
        if self._clock() > self._end:
            raise LimitError(f"it took more than {MAX_RENDER_S:g} s")

    def take_text(self, *values: Any) -> None:
        """Count values that are about to be joined to one text."""
        self.take(sum(_size(value) for value in values))

    def take_result(self, value: Any) -> Any:
        if isinstance(value, str | bytes):
            self.take(len(value))
        elif isinstance(value, list | tuple | dict):
            self.take(_ITEM_CHARS * len(value))
        return value

    def join(self, *parts: Any) -> str:
        """Compute ``a ~ b``."""
        self.take_text(*parts)
        return join_texts(map(text_of, parts))


class Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a budget per rendering."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(join_texts)  # of what a macro or a block writes

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
            optimized=False,  # compute nothing at compile time
            finalize=_finalize,
        )
        for name in _NO_FILTERS:
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters |= TRACING_FILTERS
        for name, function in list(self.filters.items()):
            self.filters[name] = _counted(name, function)
        self.globals |= {
            "raise_exception": _raise_exception,
            "namespace": _TemplateNamespace,
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        }

    def compile_bounded(self, tree: nodes.Template) -> jinja2.Template:
        """Compile `tree` with counters of its steps and joins added. Raises `jinja2.TemplateError`."""
        names = [node.name for node in tree.find_all(nodes.Name)] + [node.name for node in tree.find_all(nodes.Macro)]
        reserved = next((name for name in names if name.startswith(_RESERVED)), None)
        if reserved is not None:
            raise jinja2.TemplateError(f"it uses the name {reserved!r}")
        _CountJoins(self).visit(tree)
        _count_steps(tree, self)
        return self.from_string(tree)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Check the size of the result, then compute it."""
        budget = _budget(context)
        if isinstance(left, int) and isinstance(right, int):
            factor = abs(right) if operator == "**" else 1
            if left.bit_length() * factor + right.bit_length() > _NUM_BITS_LIMIT:
                raise LimitError(f"{operator} would give a number of more than {_NUM_BITS_LIMIT:,} bits")
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | bytes | list | tuple) and isinstance(times, int):
                    budget.take(_unit(value) * len(value) * max(times, 0))
        elif operator == "+":
            if isinstance(left, str | bytes | list | tuple) and isinstance(right, str | bytes | list | tuple):
                budget.take(_unit(left) * (len(left) + len(right)))
        elif operator == "%" and isinstance(left, str):
            _take_format(budget, left, right if isinstance(right, tuple) else (right,))
            return percent(left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Check the size of a method's result, then call the method."""
        budget = _budget(__context)
        method = getattr(__obj, "__wrapped__", __obj)  # jinja2 wraps str.format
        owner = getattr(method, "__self__", None)
        name = getattr(method, "__name__", "")
        if isinstance(owner, str | bytes | int) or owner in (str, bytes, int, float):
            if name in _NO_METHODS:
                raise LimitError(f"the method {name} is not available")
            args = _take_method(budget, owner, name, args, kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            return super(Environment, __self).call(__context, __obj, *args, **kwargs)

        if isinstance(owner, str) and (content_of(owner) or any(map(has_content, (*args, *kwargs.values())))):
            if name == "format":
                return budget.take_result(formatted(owner, call, *args, **kwargs))
            __obj = getattr(TracedText(owner, content_of(owner)), name)
            return _traced(budget.take_result(call(*args, **kwargs)))
        return budget.take_result(call(*args, **kwargs))


def _traced(value: Any) -> Any:
    """Return a result of a request's text: all of it counts as the request's, unless it says what is."""
    return TracedText(value) if isinstance(value, str) and not isinstance(value, TracedText) else value


def _take_method(budget: Budget, owner: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Check the size of a method's result; return its arguments, with generators expanded."""
    if name in _PAD_METHODS:
        _check_width(args[0] if args else 0)
    elif name == "replace" and len(args) >= 2:
        budget.take(len(owner) + owner.count(args[0]) * len(args[1]))
    elif name == "join" and args:
        parts = _listed(budget, args[0])
        budget.take_text(*parts)
        budget.take(len(owner) * len(parts))
        return (parts, *args[1:])
    elif name == "format":
        _take_format(budget, owner, (*args, *kwargs.values()))
    elif name in ("split", "rsplit", "splitlines"):
        budget.take(len(owner))
    return args


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter so that it uses the budget. The wrapper always takes the context."""
    wants = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    def bounded(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        value = _take_filter(budget, name, value, args, kwargs)
        first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
        result = function(*([first[wants]] if wants else []), value, *args, **kwargs)
        if isinstance(result, str) and any(map(has_content, (value, *args, *kwargs.values()))):
            result = _traced(result)
        return budget.take_result(result)

    return pass_context(bounded)


def _take_filter(budget: Budget, name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Check the size of a filter's result; return its value, with a generator expanded if it had to be measured."""
    numbers = [item for item in (*args, *kwargs.values()) if isinstance(item, int)]
    if name in ("center", "indent", "batch", "slice", "truncate", "tojson", "round", "int"):
        for number in numbers:
            _check_width(number)
    if name == "round" and any(abs(number) > 100 for number in numbers):
        raise LimitError("numbers are rounded to at most 100 places")
    if name == "indent":
        width = next(
            (len(item) for item in (*args, *kwargs.values()) if isinstance(item, str)), max(numbers, default=4)
        )
        budget.take(len(value) + (str(value).count("\n") + 1) * width if isinstance(value, str) else 0)
    elif name == "replace" and len(args) >= 2:
        text, old, new = str(value), str(args[0]), str(args[1])
        budget.take(len(text) + text.count(old) * len(new))
    elif name == "join":
        separator = args[0] if args else kwargs.get("d", "")
        value = _listed(budget, value)
        budget.take_text(*value)
        budget.take_text(*[separator] * len(value[:MAX_STEPS]))
    elif name == "format":
        _take_format(budget, str(value), (*args, *kwargs.values()))
    elif name == "sum":
        value = _listed(budget, value)
        total = 0
        for item in value:
            total += len(item) if isinstance(item, list | tuple | str) else 0
            budget.take(total)
    elif name in ("tojson", "string", "e", "escape", "forceescape", "urlencode", "safe", "upper", "lower", "title"):
        budget.take_text(value)
    return value


def _take_format(budget: Budget, text: str, values: Sequence[Any]) -> None:
    if _WIDE.search(text):
        raise LimitError("a format asks for more than 9,999 characters, or takes its width from a value")
    budget.take(len(text) + (text.count("%") + text.count("{")) * max(map(_size, values), default=0))


def _check_width(width: Any) -> None:
    if isinstance(width, int) and abs(width) > _MAX_WIDTH:
        raise LimitError(f"the width {width} exceeds the limit of {_MAX_WIDTH:,}")


def _listed(budget: Budget, values: Any) -> Any:
    """Expand an iterable, so that its size is known."""
    if isinstance(values, str | bytes | list | tuple | dict):
        return values
    if not isinstance(values, Iterable):
        return ()
    listed = list(islice(values, MAX_PROMPT_CHARS // _ITEM_CHARS))
    budget.take(_ITEM_CHARS * len(listed))
    return listed


def _unit(value: Any) -> int:
    return 1 if isinstance(value, str | bytes) else _ITEM_CHARS


def _size(value: Any) -> int:
    """Estimate the length of a value as text; stop soon after the limit. One list may be nested many times."""
    if isinstance(value, str | bytes):
        return len(value)
    if not isinstance(value, list | tuple | dict):
        return _ITEM_CHARS
    size, rest = 0, [value]
    while rest and size <= MAX_PROMPT_CHARS:
        item = rest.pop()
        if isinstance(item, dict):
            rest += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            rest += item
        size += len(item) if isinstance(item, str | bytes) else _ITEM_CHARS
    return size


def _budget(context: Context) -> Budget:
    budget: Budget = context.parent[BUDGET]  # a template cannot write there
    return budget


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    if isinstance(value, list | tuple | dict):
        _budget(context).take_text(value)
    return text_of(value)


class _CountJoins(NodeTransformer):
    """Replaces each ``~`` by a call that counts."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self._environment = environment

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        call = nodes.Call(nodes.Name(_JOIN, "load"), node.nodes, [], None, None)
        return call.set_lineno(node.lineno).set_environment(self._environment)


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}`` marks the text to train on; here its body is just rendered."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance's)

    def parse(self, parser: Parser) -> nodes.Node:
        """Give it a scope of its own, as transformers does."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _TemplateNamespace(Namespace):
    """jinja2's namespace without underscore names, which could replace Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no parameter names, so that namespace(self=1) works
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a namespace's names must not begin with an underscore: {name!r}")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _count_steps(tree: nodes.Template, environment: jinja2.Environment) -> None:
    """Insert a call of the step counter at the start of every loop and macro body."""
    blocks: list[nodes.For | nodes.Macro | nodes.CallBlock] = [
        *tree.find_all(nodes.For),
        *tree.find_all(nodes.Macro),
        *tree.find_all(nodes.CallBlock),
    ]
    for node in blocks:
        call = nodes.Call(nodes.Name(_STEP, "load"), [], [], None, None)
        statement = nodes.ExprStmt(call).set_lineno(node.lineno).set_environment(environment)
        node.body.insert(0, statement)
