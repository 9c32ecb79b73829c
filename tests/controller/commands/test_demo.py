"""`lorafleet demo` is a `lorafleet serve`, and refuses wrong flags before it fetches anything."""

from __future__ import annotations

import sys

import pytest

from lorafleet.controller.commands import cli, demo
from lorafleet.controller.commands.command_table import make_parser
from lorafleet.controller.commands.flags import serve_config


def test_it_serves_the_adapters_that_come_with_the_package() -> None:
    args = make_parser().parse_args(demo.serve_arguments("model", ["--port", "8123", "--max-loras", "2"]))
    config = serve_config(args)
    assert config.served_model_names == ("smollm2",) and config.port == 8123
    assert [adapter.name for adapter in config.adapters] == list(demo.ADAPTER_NAMES)
    for name in demo.ADAPTER_NAMES:
        assert (demo.ADAPTERS / name / "adapter_model.safetensors").is_file()
    assert config.allow_runtime_lora_updates


def test_wrong_flags_are_refused_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "demo_model", lambda: pytest.fail("fetched"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--max-lors", "2"])
    assert ended.value.code == 2
    assert "Did you mean --max-loras?" in capsys.readouterr().err


def test_a_model_that_cannot_be_had_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo"])
    assert ended.value.code == 2
    assert "could not be had" in capsys.readouterr().err
