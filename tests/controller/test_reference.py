"""The reference of the command line is what the options say."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafleet.controller.command_table import COMMANDS
from lorafleet.controller.flags import Command
from lorafleet.controller.reference import reference

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "cli.md"


def test_the_committed_page_is_the_generated_one() -> None:
    assert PAGE.read_text() == reference(), "run `make docs-cli`"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_option_has_a_row_with_default_and_bounds(command: Command) -> None:
    page = reference()
    assert f"## lorafleet {command.name}" in page
    for options in command.groups.values():
        for option in options:
            rows = [line for line in page.splitlines() if line.startswith((f"| `{option.flag} ", f"| `{option.flag}`"))]
            assert any(option.bounds() in row or option.is_size for row in rows), option.flag


def test_a_row_has_four_cells_whatever_its_text() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {5}


def test_up_lists_only_what_serve_has_not() -> None:
    up = reference().partition("## lorafleet up")[2].partition("## lorafleet down")[0]
    assert "--controller-port" in up and "--ray-address" in up and "--max-loras" not in up
