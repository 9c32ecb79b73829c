"""Options as flags: each reaches its configuration, and a process that we start has what we have."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest

from lorafleet.controller.arguments.flags import Command, bounds_text, command_line, default_text, made
from lorafleet.controller.commands.command_table import COMMANDS
from lorafleet.controller.gateway.limits import Limits
from lorafleet.controller.gateway.options import GatewayOptions
from lorafleet.workers.options import Declared, nested, nested_in, option, options_of


@dataclasses.dataclass(frozen=True)
class Inner:
    rest_s: float = option(0.5, group="g", above=0.0, maximum=9.0, help="time")


@dataclasses.dataclass(frozen=True)
class Outer:
    model: str = option(is_positional=True, is_required=True, metavar="MODEL", help="a model")
    count: int = option(3, group="g", minimum=1, maximum=9, help="how many of 100%")
    size_bytes: int | None = option(None, group="h", minimum=1, maximum=1 << 40, help="size", default_text="all")
    names: tuple[str, ...] = option((), group="h", flag="--name", metavar="NAME", help="names")
    is_on: bool = option(True, group="h", help="whether")
    is_off: bool = option(False, group="h", help="whether")
    level: Literal["low", "high"] = option("low", group="h", help="how much")
    key: str | None = option(None, group="h", is_secret=True, metavar="KEY", help="secret", fallback=lambda: "asked")
    inner: Inner = nested(Inner)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    Command("c", "p", (Outer,), "d").add_flags(parser)
    return parser


def given(*words: str) -> Outer:
    return made(Outer, parser().parse_args(words))


def test_what_is_not_given_is_left_to_the_declaration() -> None:
    assert given("m") == Outer("m", key="asked")


def test_each_kind_of_value_is_read() -> None:
    words = "m --count 4 --size-bytes 2MiB --name a b --name c --no-is-on --is-off --level high --key k --rest-s 2"
    expected = Outer("m", 4, 2 << 20, ("a", "b", "c"), False, True, "high", "k", Inner(2.0))
    assert given(*words.split()) == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--count", "many"), "argument --count: 'many' must be a whole number from 1 to 9"),
        (("--rest-s", "soon"), "argument --rest-s: 'soon' must be a number above 0, at most 9"),
        (("--size-bytes", "2XiB"), "argument --size-bytes: '2XiB' is not a size"),
        (("--level", "none"), "argument --level: invalid choice: 'none'"),
    ],
)
def test_a_text_that_is_no_value_is_told_what_would_be(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        given("m", *words)
    assert said in capsys.readouterr().err


def test_help_names_bounds_and_default() -> None:
    text = " ".join(parser().format_help().split())
    assert "--count N how many of 100% (from 1 to 9; default: 3)" in text
    assert "--size-bytes SIZE size (from 1 to 1TiB; default: all)" in text
    assert "--rest-s SECONDS time (above 0, at most 9; default: 0.5)" in text


def test_a_command_line_gives_what_the_configuration_has_but_for_secrets() -> None:
    config = Outer("-m", 4, 2 << 20, ("a", "b"), False, True, "high", "secret", Inner(2.0))
    words = command_line(config, Outer)
    assert "secret" not in " ".join(words)
    positional = [word for word in words if word.startswith("MODEL")]
    assert given("m", *(word for word in words if word not in positional)) == dataclasses.replace(
        config, model="m", key="asked"
    )


def changed(declared: Declared) -> Any:
    """A value that is not the default."""
    it = declared.says
    if declared.kind is bool:
        return not declared.default
    if it.choices:
        return next(choice for choice in it.choices if choice != declared.default)
    if declared.kind in (int, float):
        assert it.maximum is not None
        least = it.minimum if it.minimum is not None else it.maximum / 2
        return declared.kind(it.maximum if least == declared.default else least)
    return ("x", "y") if declared.takes_several else "x"


@pytest.mark.parametrize("declared", options_of(GatewayOptions), ids=lambda declared: declared.name)
def test_each_option_of_gateways_survives_their_command_line(declared: Declared) -> None:
    value = changed(declared)
    if declared.name == "max_body_bytes":
        config = GatewayOptions(limits=Limits(max_body_bytes=1 << 20))
    elif declared.name == "max_buffered_bytes":
        config = GatewayOptions(limits=Limits(max_buffered_bytes=1 << 40))
    elif declared.path:
        (owner,) = declared.path
        value = ("https://x.example", "https://y.example") if declared.name == "allowed_origins" else value
        config = GatewayOptions(**{owner: nested_in(GatewayOptions)[owner](**{declared.name: value})})
    else:
        config = GatewayOptions(**{declared.name: value})
    assert config != GatewayOptions()
    parser = argparse.ArgumentParser()
    Command("c", "p", (GatewayOptions,), "d").add_flags(parser)
    words = command_line(config, GatewayOptions)
    if declared.says.is_secret:
        assert words == command_line(GatewayOptions(), GatewayOptions), "secrets travel in the environment"
    else:
        assert made(GatewayOptions, parser.parse_args(words)) == config


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_option_says_what_it_is_and_every_number_has_bounds(command: Command) -> None:
    for title, options in command.groups.items():
        for declared in options:
            it = declared.says
            assert it.help and not it.help.endswith("."), declared.flag
            assert bool(title) or it.is_positional or command.name == "status", declared.flag
            if declared.kind in (int, float) and not it.choices:
                assert it.maximum is not None and (it.minimum is None) is not (it.above is None), declared.flag
                assert bounds_text(declared), declared.flag
            assert it.is_required or default_text(declared), f"{declared.flag} has a default that nobody is told"
            assert it.is_required or declared.takes(declared.default) or declared.flag == "--served-model-name"


def test_paths_are_paths() -> None:
    (up,) = (command for command in COMMANDS if command.name == "up")
    assert {declared.kind for declared in up.groups["cluster"] if declared.flag == "--token-file"} == {Path}
