"""The options of gateways, for each command that starts them."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from lorafleet.controller.arguments.flags import Command, made
from lorafleet.controller.gateway.api_keys import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE
from lorafleet.controller.gateway.options import GatewayOptions
from lorafleet.workers.errors import ConfigError


def test_a_key_of_a_flag_comes_before_the_variable_and_a_comma_belongs_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    Command("c", "p", (GatewayOptions,), "d").add_flags(parser)

    def keys(*words: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        options = made(GatewayOptions, parser.parse_args(words))
        return options.api_keys, options.admin_api_keys

    monkeypatch.setenv(API_KEY_VARIABLE, "a,b")
    monkeypatch.delenv(ADMIN_KEY_VARIABLE, raising=False)
    assert keys() == (("a", "b"), ())
    words = ["--api-key", "x,9f2", "y", "--api-key", "z", "--admin-api-key", "root"]
    assert keys(*words) == (("x,9f2", "y", "z"), ("root",))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"port": 0}, "--port is 0; it must be a whole number from 1 to 65535."),
        ({"drain_timeout_s": float("nan")}, "--drain-timeout-s is nan; it must be a number from 0 to 86400."),
        ({"log_level": "loud"}, "--log-level is 'loud'; it must be one of debug, info, warning, error."),
        ({"api_keys": ("",)}, "--api-key has an API key that is empty"),
        ({"admin_api_keys": ("a b",)}, "--admin-api-key has an API key with white space"),
        ({"access_log": "no"}, "--access-log is 'no'; it must be True or False."),
    ],
)
def test_what_cannot_be_is_refused_by_flag(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GatewayOptions(**options)
    assert caught.value.message.startswith(said)


def test_keys_are_not_shown() -> None:
    assert "secret" not in repr(GatewayOptions(api_keys=("secret-1",), admin_api_keys=("secret-2",)))
