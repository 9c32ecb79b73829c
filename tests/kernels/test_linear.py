"""Linear layers against torch, at every instruction set."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import close, dtypes

from lorafleet.kernels.dispatch import forced
from lorafleet.kernels.linear import gather_rows, linear, linear_reference, prepare, quantize_int8

pytestmark = pytest.mark.usefixtures("each_level")


@dtypes
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 48), (576, 960), (50, 33), (2, 5), (30, 131)])
@pytest.mark.parametrize("rows", [0, 1, 3, 7, 33])
@pytest.mark.parametrize("form", ["plain", "packed", "int8", "packed int8"])
@pytest.mark.parametrize("biased", [False, True])
def test_linear(rows: int, num_in: int, num_out: int, form: str, biased: bool, dtype: torch.dtype) -> None:
    packed = "packed" in form
    weight = prepare((torch.randn(num_out, num_in) / num_in**0.5).to(dtype), int8="int8" in form, packed=packed)
    assert (weight.num_in, weight.num_out, weight.is_packed) == (num_in, num_out, packed)
    bias = torch.randn(num_out).to(dtype) if biased else None
    x = torch.randn(rows, num_in + 6).to(dtype)[:, :num_in]
    with forced(None):
        expected = linear(x, weight, bias)
    close(linear(x, weight, bias), expected)


def test_an_odd_number_of_inputs_is_never_packed() -> None:
    weight = prepare(torch.randn(5, 33).bfloat16())
    assert not weight.is_packed
    x = torch.randn(3, 33).bfloat16()
    close(linear(x, weight), linear_reference(x, weight))


def test_packed_weights_are_the_weights() -> None:
    weight = torch.randn(131, 30).bfloat16()
    ids = torch.tensor([0, 130, 17, 17, 15, 16])
    for packed in (False, True):
        prepared = prepare(weight, packed=packed)
        assert torch.equal(gather_rows(prepared, ids), weight[ids])
        close(linear_reference(torch.eye(30).bfloat16(), prepared), weight.T)


def test_nan_in_a_row_of_x_stays_in_its_row_of_y() -> None:
    weight = prepare(torch.randn(40, 64).bfloat16(), packed=True)
    x = torch.randn(9, 64).bfloat16()
    clean = linear(x, weight)
    x[4, 3] = torch.nan
    spoilt = linear(x, weight)
    assert spoilt[4].isnan().all()
    rows = [row for row in range(9) if row != 4]
    assert torch.equal(spoilt[rows], clean[rows])


def test_int8_rounds_to_the_nearest_of_255_steps_per_output() -> None:
    weight = torch.randn(20, 64).bfloat16()
    weight[3] = 0.0
    integers, scale = quantize_int8(weight)
    assert integers.abs().amax(dim=1).tolist() == [127] * 3 + [0] + [127] * 16
    error = (integers.float() * scale[:, None] - weight.float()).abs()
    assert (error <= 0.51 * scale[:, None]).all()
