"""API keys on command lines and in the environment."""

from __future__ import annotations

import os

import pytest

from lorafleet.controller.gateway.api_keys import (
    ADMIN_KEY_VARIABLE,
    API_KEY_VARIABLE,
    MAX_KEY_CHARS,
    as_environment,
    check_keys,
    keys_of_variable,
    num_weak,
)
from lorafleet.workers.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("", []),
        ("one", ["one"]),
        ("one,two", ["one", "two"]),
        (" one , two,", ["one", "two"]),
        ('["x,9f2c", "two"]', ["x,9f2c", "two"]),
        (' ["[odd"]', ["[odd"]),
    ],
)
def test_a_variable_holds_one_key_several_or_an_array(
    text: str, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, text)
    assert keys_of_variable(API_KEY_VARIABLE) == keys


@pytest.mark.parametrize("text", [" ", ",", " , ,", "[]", "[1]", '["secret"', '[["secret"]]', "[" * 100_000])
def test_a_variable_that_gives_no_key_does_not_open_the_server(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, text)
    with pytest.raises(ConfigError, match=API_KEY_VARIABLE) as refused:
        keys_of_variable(API_KEY_VARIABLE)
    assert "secret" not in refused.value.message


def test_keys_reach_another_process_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ADMIN_KEY_VARIABLE, "inherited")
    keys = ("x,9f2c71d8e0b44a", "[two", 'three"')
    environment = as_environment(keys, ())
    assert ADMIN_KEY_VARIABLE not in environment
    assert environment["PATH"] == os.environ["PATH"]
    monkeypatch.setenv(API_KEY_VARIABLE, environment[API_KEY_VARIABLE])
    assert tuple(keys_of_variable(API_KEY_VARIABLE)) == keys


@pytest.mark.parametrize("key", ["", " ", "a b", " a", "a\n", "ключ", "a\x7f", "k" * (MAX_KEY_CHARS + 1)])
def test_what_no_client_could_send_is_no_key(key: str) -> None:
    with pytest.raises(ConfigError, match="--api-key"):
        check_keys("--api-key", ["good-key", key])


def test_short_keys_are_counted() -> None:
    assert num_weak(["x", "0123456789abcdef"]) == 1
