"""The error for a mistyped command line: the command's own usage, and the nearest flag or command."""

from __future__ import annotations

import pytest

from lorafleet.controller.commands.cli import main


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("arguments", "usage", "message"),
    [
        (
            ["serve", "m", "--max-lora", "4"],
            "lorafleet serve",
            "There is no flag '--max-lora'. Did you mean --max-loras?",
        ),
        (["serve", "m", "--prt=9"], "lorafleet serve", "There is no flag '--prt'. Did you mean --port?"),
        (["serve", "--ports", "9"], "lorafleet serve", "Did you mean --port?"),  # before what is missing
        (["serve", "m", "--swap-space", "4"], "lorafleet serve", "`lorafleet serve --help` lists them."),
        (["serve", "--model", "m"], "lorafleet serve", "There is no flag --model: give MODEL without one."),
        (["serve", "m", "extra"], "lorafleet serve", "'extra' is one value too many."),
        (["serve", "m", "--dtype", "floot32"], "lorafleet serve", "Did you mean float32?"),
        (["serve", "m", "--port", "70000"], "lorafleet serve", "--port is 70000"),
        (["up", "m", "--gateway", "all"], "lorafleet up", "Did you mean --gateways?"),
        (["down", "--drain-timeout", "1"], "lorafleet down", "Did you mean --drain-timeout-s?"),
        (["restart", "--ray-adress", "x"], "lorafleet restart", "Did you mean --ray-address?"),
        (["drain", "--verbose"], "lorafleet drain", "There is no flag '--verbose'"),
        (["status", "--ulr", "x"], "lorafleet status", "Did you mean --url?"),
        (["gateway", "--controler", "x"], "lorafleet gateway", "Did you mean --controller?"),
        (["serv", "m"], "lorafleet", "Did you mean serve?"),
        (["--versoin"], "lorafleet", "Did you mean --version?"),
    ],
)
def test_a_mistake_is_told_with_the_usage_of_its_command(
    capsys: pytest.CaptureFixture[str], arguments: list[str], usage: str, message: str
) -> None:
    said = refusal(capsys, *arguments)
    assert said.startswith(f"usage: {usage} [")
    assert said.splitlines()[-1].startswith(f"{usage}: error: ")
    assert message in said


@pytest.mark.parametrize("value", ["x" * 100_000, "--" + "x" * 100_000])
def test_a_value_of_any_length_is_quoted_in_part(capsys: pytest.CaptureFixture[str], value: str) -> None:
    for arguments in (
        [value],
        ["serve", "m", "--dtype", value],
        ["serve", "m", "--port", value],
        ["serve", "m", value],
    ):
        assert len(refusal(capsys, *arguments).splitlines()[-1]) < 500
