"""The commands that there are, and that each explains itself."""

from __future__ import annotations

import pytest

from lorafleet.controller.cli import main
from lorafleet.controller.command_table import COMMANDS
from lorafleet.controller.flags import Command


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_lists_every_command_with_its_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "--help")
    assert all(f"{command.name} {command.purpose}" in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_the_help_of_a_command_has_all_its_flags(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, command.name, "--help")
    assert text.startswith(f"usage: lorafleet {command.name} ")
    assert all(option.flag in text for options in command.groups.values() for option in options)


def test_up_has_an_address_of_its_own_and_all_else_of_serve() -> None:
    serve, up = (
        {option.flag: option for options in command.groups.values() for option in options}
        for name in ("serve", "up")
        for command in COMMANDS
        if command.name == name
    )
    assert {flag for flag, option in serve.items() if up.get(flag) != option} == {"--ray-address"}
    assert (serve["--ray-address"].default, up["--ray-address"].default) == (None, "auto")
