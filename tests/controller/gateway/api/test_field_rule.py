"""What becomes of each field at each endpoint."""

from __future__ import annotations

import msgspec
import pytest

from lorafleet.controller.gateway.api.body import decode
from lorafleet.controller.gateway.api.field_rule import ENDPOINTS, rule_of
from lorafleet.controller.gateway.api.known_fields import HARMLESS, OF_GENERATION, OTHER_NAMES
from lorafleet.controller.gateway.api.schema import ASKS_NOTHING, ChatRequest, CompletionRequest, TokenizeRequest


class Inner(msgspec.Struct, kw_only=True):
    a: int | None = None
    more: Inner | None = None


class Outer(msgspec.Struct, kw_only=True):
    inner: Inner | None = None


def test_fields_of_objects_within_a_body_follow_the_rule_too() -> None:
    body = decode(b'{"inner": {"a": 1, "b": 2, "more": {"a": 3, "c": 4, "d": null}}, "e": 5}', Outer)
    assert body.ignored == ["inner.b", "inner.more.c", "e"]
    assert body.fields == Outer(inner=Inner(a=1, more=Inner(a=3)))


@pytest.mark.parametrize(("kind", "other"), [(ChatRequest, CompletionRequest), (CompletionRequest, ChatRequest)])
def test_what_only_the_other_endpoint_honours_is_refused(
    kind: type[msgspec.Struct], other: type[msgspec.Struct]
) -> None:
    rule = rule_of(kind)
    names = set(other.__struct_fields__) - rule.honoured
    assert names
    assert {name for name in names if not rule.is_refused(name)} == set()
    assert all(rule.asks_nothing(name, None) for name in names)


def test_a_honoured_field_is_neither_refused_nor_another_name() -> None:
    for kind in ENDPOINTS.values():
        rule = rule_of(kind)
        assert {name for name in rule.honoured if rule.is_refused(name)} == set()
        assert not rule.honoured & rule.other_names.keys()
        assert set(rule.other_names.values()) <= rule.honoured


def test_no_field_is_in_two_tables() -> None:
    assert not (HARMLESS | ASKS_NOTHING) & OF_GENERATION.keys()
    assert not OTHER_NAMES.keys() & (HARMLESS | ASKS_NOTHING | OF_GENERATION.keys())


def test_what_renders_a_chat_is_refused_where_chats_are_tokenised() -> None:
    rule = rule_of(TokenizeRequest)
    assert rule.is_refused("chat_template")
    assert not rule.is_refused("temperature")


@pytest.mark.parametrize(
    ("name", "value", "asks_nothing"),
    [
        ("typical_p", 1, True),
        ("typical_p", 1.0, True),
        ("typical_p", True, False),
        ("watermark", 0, False),
        ("watermark", False, True),
        ("tools", {}, False),
        ("no_such_field", None, True),
        ("no_such_field", 0, False),
    ],
)
def test_a_value_that_asks_for_nothing_has_the_type_of_the_default(
    name: str, value: object, asks_nothing: bool
) -> None:
    assert rule_of(CompletionRequest).asks_nothing(name, value) is asks_nothing
