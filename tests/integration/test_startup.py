"""A server that cannot start says why on one line, and leaves no process."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving import Server, start


def spoil_missing(adapter: Path) -> None:
    shutil.rmtree(adapter)


def spoil_not_peft(adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()


def spoil_pickle(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({}, adapter / "adapter_model.bin")


def spoil_non_finite(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, path)


def spoil_feature(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": ["lm_head"]}))


def spoil_shape(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file(
        {name: tensor.repeat(1, 2) if "lora_A" in name else tensor for name, tensor in load_file(path).items()}, path
    )


BAD_ADAPTERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing directory": (spoil_missing, "does not exist"),
    "not PEFT": (spoil_not_peft, "adapter_config.json"),
    "pickle": (spoil_pickle, "adapter_model.bin, a pickle"),
    "non-finite weights": (spoil_non_finite, "NaN"),
    "unsupported feature": (spoil_feature, "modules_to_save"),
    "shapes of another base": (spoil_shape, "another base model"),
}


def failed(server: Server, timeout_s: float = 90.0) -> str:
    """Return the output of a server that cannot start; asserts that it exited with code 1 and left no process."""
    try:
        assert server.process.wait(timeout_s) == 1, server.output
    finally:
        server.stop()
    assert "Traceback" not in server.output
    assert not server.survivors(), "processes were left"
    return server.output


@pytest.mark.parametrize("what", BAD_ADAPTERS)
def test_a_bad_adapter_names_itself_the_file_and_the_reason(what: str, tiny_model: Path, tmp_path: Path) -> None:
    spoil, message = BAD_ADAPTERS[what]
    adapter = tmp_path / "bad"
    shutil.copytree(tiny_model.parent / "good", adapter)
    spoil(adapter)
    modules = [f"fine={tiny_model.parent / 'good'}", f"spoilt={adapter}"]
    output = failed(start(str(tiny_model), "--enable-lora", "--lora-modules", *modules))
    (line,) = [line for line in output.splitlines() if line.startswith("lorafleet: error:")]
    assert "'spoilt'" in line and str(adapter) in line and message in line


def test_a_rank_over_the_limit_names_the_flag_and_the_value(tiny_model: Path) -> None:
    module = f"good={tiny_model.parent / 'good'}"
    output = failed(start(str(tiny_model), "--enable-lora", "--max-lora-rank", "2", "--lora-modules", module))
    assert "rank 4; the limit is 2" in output and "--max-lora-rank 4" in output


def test_a_plan_that_cannot_fit_names_the_number_to_change(tiny_model: Path) -> None:
    output = failed(start(str(tiny_model), "--kv-cache-memory-bytes", "1000"))
    assert "--max-model-len 1024" in output and "--kv-cache-memory-bytes to" in output


def test_a_taken_port_is_refused_at_once(tiny_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        output = failed(start(str(tiny_model), port=port), timeout_s=10)
    assert f"127.0.0.1:{port}" in output and "--port" in output


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    output = failed(start(str(tmp_path / "nothing")), timeout_s=30)
    assert str(tmp_path / "nothing") in output
