"""The version of an op for each device; a test's choice of another version ends with its block."""

from __future__ import annotations

import pytest
import torch

from lorafleet.kernels import dispatch
from lorafleet.kernels.dispatch import forced, uses_triton

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("is_wanted", [True, False])
def test_triton_runs_on_a_gpu_unless_it_is_turned_off(is_wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_is_triton_wanted", is_wanted)
    assert uses_triton(CUDA) is is_wanted
    assert not uses_triton(CPU)


def test_a_forced_version_holds_within_its_block_whatever_the_device() -> None:
    with forced("triton"):
        assert uses_triton(CPU)
        with pytest.raises(ValueError, match="in the block"), forced(None):
            assert not uses_triton(CUDA)
            raise ValueError("in the block")
        assert uses_triton(CPU)
    assert not uses_triton(CPU)
