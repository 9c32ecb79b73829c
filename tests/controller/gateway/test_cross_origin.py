"""The options for cross-origin requests."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from lorafleet.controller.arguments.flags import Command, command_line, made
from lorafleet.controller.gateway.cross_origin import CrossOrigin
from lorafleet.workers.errors import ConfigError


def parsed(*words: str) -> CrossOrigin:
    parser = argparse.ArgumentParser()
    Command("c", "p", (CrossOrigin,), "d").add_flags(parser)
    return made(CrossOrigin, parser.parse_args(words))


@pytest.mark.parametrize(
    "words",
    [
        ("--allowed-origins", "https://a.example", "http://localhost:3000/"),
        ("--allowed-origins", "HTTPS://A.example", "--allowed-origins", "http://localhost:3000"),
        ("--allowed-origins", '["https://a.example", "http://localhost:3000"]'),
        ("--allowed-origins=['bad'", "--allowed-origins", "x"),
    ],
)
def test_origins_are_words_or_a_json_array(words: tuple[str, ...]) -> None:
    if "bad" in words[0]:
        with pytest.raises(ConfigError, match=r"--allowed-origins is .*JSON array"):
            parsed(*words)
        return
    allowed = parsed(*words)
    assert allowed.allowed_origins == ("https://a.example", "http://localhost:3000")
    assert parsed(*command_line(allowed, CrossOrigin)) == allowed, "as a gateway process gets it"
    assert allowed.allows_origin("https://A.example")
    assert not allowed.allows_origin("https://b.example")
    assert not allowed.allows_origin("https://a.example.evil.example")
    assert not allowed.allows_origin("null")


def test_no_origin_is_allowed_by_default_and_a_star_allows_all() -> None:
    assert not CrossOrigin().allows_origin("https://a.example")
    assert parsed("--allowed-origins", "*").allows_origin("https://a.example")
    assert parsed("--allowed-origins", '["*"]').allows_origin("null")


def test_methods_and_headers_are_limited_where_they_are_named() -> None:
    allowed = parsed("--allowed-methods", "POST", "--allowed-headers", '["Authorization", "X-One"]')
    assert (allowed.allows_method("POST"), allowed.allows_method("GET")) == (True, False)
    assert allowed.allows_header("authorization")
    assert allowed.allows_header("Content-Type"), "which any page may send"
    assert not allowed.allows_header("x-two")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"allowed_origins": ("a.example",)}, "--allowed-origins has 'a.example'; an origin is a scheme"),
        ({"allowed_origins": ("https://a.example/path",)}, "--allowed-origins has 'https://a.example/path'"),
        ({"allowed_origins": ("https://a.example, https://b.example",)}, "--allowed-origins has"),
        ({"allowed_origins": ("",)}, "--allowed-origins has ''"),
        ({"allowed_origins": ("[1]",)}, "--allowed-origins is '[1]'; it must be words, or a JSON array"),
        ({"allowed_methods": ("PO ST",)}, "--allowed-methods has 'PO ST'"),
        ({"allowed_headers": ("x\r\ny",)}, "--allowed-headers has "),
        ({"allow_credentials": "yes"}, "--allow-credentials is 'yes'; it must be True or False."),
    ],
)
def test_what_cannot_be_is_refused_by_flag(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CrossOrigin(**options)
    assert caught.value.message.startswith(said)
