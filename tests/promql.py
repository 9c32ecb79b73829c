"""The part of PromQL that monitoring uses: the series a query reads, and the labels of its answer.

Owns: parsing a query; refusing unknown names, labels and functions, and vectors that could never match. Leaves to
others: the existing series, and all about values (promtool).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""(?P<space>\s+|\#[^\n]*)
    |(?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|`[^`]*`)
    |(?P<number>\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![a-z\d])|(?:\d+(?:ms|[smhdwy]))+)
    |(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)
    |(?P<sign>[=!]~|[=!<>]=|[-+*/%^=<>(){}\[\],@:])""",
    re.VERBOSE,
)
_AGGREGATIONS = frozenset({"sum", "max", "min", "avg", "count", "group"})
_RANKINGS = frozenset({"topk", "bottomk"})
_KEEPING = frozenset(
    {"rate", "increase", "deriv", "delta", "changes", "clamp_min", "clamp_max"}
    | {f"{kind}_over_time" for kind in ("max", "min", "avg", "sum", "count", "last")}
)
_SETS = frozenset({"and", "or", "unless"})
_OPERATORS = _SETS | {"+", "-", "*", "/", "%", "^", "==", "!=", "<", ">", "<=", ">="}

Labels = frozenset[str]


class QueryError(ValueError):
    """The query is invalid, or reads an unknown series."""


@dataclass(frozen=True, slots=True)
class Selector:
    """One mention of a series. aggregation: the innermost one around it, empty if there is none."""

    name: str
    matchers: tuple[tuple[str, str, str], ...]  # label, operator, value
    aggregation: str


@dataclass(frozen=True, slots=True)
class Query:
    """The series a query reads, and the labels of its answer; None for a scalar."""

    selectors: tuple[Selector, ...]
    labels: Labels | None


def read(text: str, series: Mapping[str, Set[str]]) -> Query:
    """Parse a query. series: the labels of each. Raises QueryError."""
    reader = _Reader(text, series)
    labels = reader.expression()
    reader.expect("")
    return Query(tuple(reader.selectors), labels)


class _Reader:
    def __init__(self, text: str, series: Mapping[str, Set[str]]) -> None:
        self.selectors: list[Selector] = []
        self._series = series
        self._tokens: list[str] = []
        self._aggregations = [""]
        at = 0
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                raise QueryError(f"{text[at : at + 20]!r} is no PromQL")
            at = match.end()
            if match.lastgroup != "space":
                self._tokens.append(match.group())
        self._tokens.reverse()

    @property
    def _next(self) -> str:
        return self._tokens[-1] if self._tokens else ""

    def _take(self) -> str:
        if not self._tokens:
            raise QueryError("the query breaks off")
        return self._tokens.pop()

    def expect(self, token: str) -> None:
        """Consume a token; an empty one is the end."""
        if self._next != token:
            raise QueryError(f"{self._next!r} where {token!r} should be")
        if token:
            self._take()

    def expression(self) -> Labels | None:
        """Parse operators from left to right, since their precedence does not matter for the labels."""
        left = self._operand()
        while self._next in _OPERATORS:
            operator = self._take()
            if self._next == "bool":
                self._take()
            on = self._labels() if self._next == "on" and self._take() else None
            left = _combined(operator, left, self._operand(), on)
        return left

    def _operand(self) -> Labels | None:
        token = self._take()
        if token in ("-", "+"):
            return self._operand()
        if token == "(":
            labels = self.expression()
            self.expect(")")
        elif token[0].isdigit() or token[0] in "\"'`":
            return None
        elif not (token[0].isalpha() or token[0] in "_:"):
            raise QueryError(f"{token!r} where a series or a function should be")
        elif token in _AGGREGATIONS or token in _RANKINGS:
            labels = self._aggregation(token)
        elif self._next == "(":
            labels = self._call(token)
        else:
            labels = self._selector(token)
        if self._next == "[":
            while self._take() != "]":
                pass
        if self._next == "offset":
            self._take()
            self._take()
        return labels

    def _arguments(self) -> list[Labels | None]:
        self.expect("(")
        found = []
        while self._next != ")":
            found.append(self.expression())
            if self._next != ")":
                self.expect(",")
        self.expect(")")
        return found

    def _labels(self) -> Labels:
        self.expect("(")
        found = set()
        while self._next != ")":
            found.add(self._take())
            if self._next != ")":
                self.expect(",")
        self.expect(")")
        return frozenset(found)

    def _aggregation(self, name: str) -> Labels | None:
        by = self._labels() if self._next == "by" and self._take() else None
        self._aggregations.append(name)
        inner = self._arguments()[-1]
        self._aggregations.pop()
        if self._next == "by" and self._take():
            by = self._labels()
        if inner is None:
            raise QueryError(f"{name} of a scalar")
        if by is not None and not by <= inner:
            raise QueryError(f"{name} by {sorted(by - inner)}, which is not among the labels {sorted(inner)}")
        if name in _RANKINGS:
            return inner
        return by or frozenset()

    def _call(self, name: str) -> Labels | None:
        arguments = self._arguments()
        if name == "time":
            return None
        if name == "absent":
            return frozenset()
        if name == "histogram_quantile":
            if arguments[-1] is None or "le" not in arguments[-1]:
                raise QueryError("histogram_quantile of something without le")
            return arguments[-1] - {"le"}
        if name in _KEEPING:
            return arguments[0]
        raise QueryError(f"there is no function {name}, or the tests do not know it")

    def _selector(self, name: str) -> Labels:
        if name not in self._series:
            raise QueryError(f"there is no series {name}")
        labels = frozenset(self._series[name])
        matchers = []
        if self._next == "{":
            self._take()
            while self._next != "}":
                matchers.append((self._take(), self._take(), self._take()[1:-1]))
                if self._next != "}":
                    self.expect(",")
            self.expect("}")
        for label, _, _ in matchers:
            if label not in labels:
                raise QueryError(f"{name} has no label {label}, only {sorted(labels)}")
        self.selectors.append(Selector(name, tuple(matchers), self._aggregations[-1]))
        return labels


def _combined(operator: str, left: Labels | None, right: Labels | None, on: Labels | None) -> Labels | None:
    if left is None or right is None:
        return right if left is None else left
    if on is None and left != right:
        raise QueryError(f"{operator} between the labels {sorted(left)} and {sorted(right)} never matches")
    if on is not None and not on <= left & right:
        raise QueryError(f"{operator} on {sorted(on)}, which not both sides have")
    return left if on is None or operator in _SETS else on
