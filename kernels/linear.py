"""Linear layers: y = x·Wᵀ + bias, with W in the activations' dtype, or in 8-bit integers with a scale per output.

On a CPU, W is packed once, at load time, in our kernel's reading order: for sixteen outputs, the inputs that are
multiplied together (pairs of bfloat16 or integers, as in AVX-512 and AMX, or single floats) are adjacent. For an
unpacked W (bfloat16 with an odd number of inputs) our kernel handles up to four rows; torch computes more rows.

T rows, I in features, O out features, G groups of 16 out features, U inputs that are multiplied together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lorafleet.kernels.native import DTYPE_CODES, is_recording, library

_GROUP = 16
_MAX_PLAIN_ROWS = 4


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """W in the form that `linear` reads; made by `prepare`."""

    data: torch.Tensor  # [O, I], or packed [G, I / U, 16, U]
    scale_O: torch.Tensor | None  # float32, with 8-bit integers
    num_out: int

    @property
    def num_in(self) -> int:
        return self.data.shape[1] * (self.data.shape[3] if self.is_packed else 1)

    @property
    def is_packed(self) -> bool:
        return self.data.dim() == 4


def prepare(weight_OI: torch.Tensor, *, int8: bool = False, packed: bool | None = None) -> LinearWeight:
    """Convert W to the fastest form for this device. With `int8` it is rounded to integers (see `quantize_int8`).

    `packed` None chooses automatically. The result may share W's memory.
    """
    num_out, num_in = weight_OI.shape
    unit = 2 if int8 or weight_OI.dtype == torch.bfloat16 else 1
    if packed is None:
        fits = weight_OI.dtype == torch.bfloat16 or (weight_OI.dtype in DTYPE_CODES and not int8)
        packed = fits and weight_OI.device.type == "cpu" and num_in % unit == 0 and library() is not None
    data, scale_O = quantize_int8(weight_OI) if int8 else (weight_OI, None)
    return LinearWeight(_pack(data, unit) if packed else data, scale_O, num_out)


def linear(
    x_TI: torch.Tensor, weight: LinearWeight, bias_O: torch.Tensor | None = None, out_TO: torch.Tensor | None = None
) -> torch.Tensor:
    """Return [T, O], contiguous, in `out_TO` if given.

    Sums are float32; integer weights are multiplied with x unscaled, then the sums are scaled.
    """
    native = library()
    if native is None or not _is_native(x_TI, weight):
        assert not is_recording(), "torch's products cannot be recorded"
        if out_TO is None:
            return linear_reference(x_TI, weight, bias_O)
        if weight.is_packed or weight.scale_O is not None:
            return out_TO.copy_(linear_reference(x_TI, weight, bias_O))
        if bias_O is None:
            return torch.mm(x_TI, weight.data.T, out=out_TO)
        return torch.addmm(bias_O, x_TI, weight.data.T, out=out_TO)
    rows, num_in = x_TI.shape
    data = weight.data
    assert num_in == weight.num_in and x_TI.stride(1) == 1 and data.is_contiguous()
    assert bias_O is None or bias_O.dtype == x_TI.dtype
    y_TO = x_TI.new_empty(rows, weight.num_out) if out_TO is None else out_TO
    assert y_TO.is_contiguous() and y_TO.shape == (rows, weight.num_out) and y_TO.dtype == x_TI.dtype
    x, stride, bias, y = x_TI.data_ptr(), x_TI.stride(0), None if bias_O is None else bias_O.data_ptr(), y_TO.data_ptr()
    if not weight.is_packed:
        native.lf_linear(x, stride, data.data_ptr(), bias, y, rows, num_in, weight.num_out)
    elif weight.scale_O is None:
        code = DTYPE_CODES[x_TI.dtype]
        native.lf_linear_packed(code, x, stride, data.data_ptr(), bias, y, rows, data.shape[1], weight.num_out)
    else:
        scale = weight.scale_O.data_ptr()
        native.lf_linear_packed_int8(x, stride, data.data_ptr(), scale, bias, y, rows, data.shape[1], weight.num_out)
    return y_TO


def _is_native(x_TI: torch.Tensor, weight: LinearWeight) -> bool:
    """Return whether our kernel, if present, computes this product."""
    if x_TI.device.type != "cpu":
        return False
    if weight.scale_O is not None:
        return weight.is_packed and x_TI.dtype == torch.bfloat16
    if x_TI.dtype != weight.data.dtype:
        return False
    return weight.is_packed or (x_TI.dtype == torch.bfloat16 and x_TI.shape[0] <= _MAX_PLAIN_ROWS)


def linear_reference(x_TI: torch.Tensor, weight: LinearWeight, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    data_OI = _unpack(weight.data)[: weight.num_out] if weight.is_packed else weight.data
    if weight.scale_O is None:
        return F.linear(x_TI, data_OI, bias_O)
    # The integers are exact in bfloat16, which has 8 significant bits; the scale is applied to the result.
    y_TO = F.linear(x_TI, data_OI.to(x_TI.dtype)).float() * weight.scale_O
    return (y_TO if bias_O is None else y_TO + bias_O.float()).to(x_TI.dtype)


def gather_rows(weight: LinearWeight, ids_T: torch.Tensor) -> torch.Tensor:
    """Return rows of W by index, [T, I], for embeddings that share memory with the head."""
    if not weight.is_packed:
        return F.embedding(ids_T, weight.data)
    return weight.data[ids_T // _GROUP, :, ids_T % _GROUP].flatten(1)


def dense(weight: LinearWeight, rows: slice) -> torch.Tensor:
    """Return rows of W as float32 [O, I] in new memory: the values used in products, including rounding to integers."""
    if weight.is_packed:
        first = rows.start // _GROUP
        groups = weight.data[first : -(-rows.stop // _GROUP)]
        data_OI = _unpack(groups)[rows.start - first * _GROUP : rows.stop - first * _GROUP]
    else:
        data_OI = weight.data[rows]
    data_OI = data_OI.to(torch.float32, copy=True)
    return data_OI if weight.scale_O is None else data_OI.mul_(weight.scale_O[rows, None])


def quantize_int8(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (int8 [O, I], float32 scale [O]) with weight ≈ scale · integers: symmetric, per output, to nearest."""
    scale_O = weight_OI.abs().amax(dim=1).float().clamp_min_(torch.finfo(torch.float32).tiny) / 127
    return (weight_OI / scale_O[:, None]).round_().to(torch.int8), scale_O


def _pack(weight_OI: torch.Tensor, unit: int) -> torch.Tensor:
    num_out, num_in = weight_OI.shape
    num_more = -num_out % _GROUP
    padded = F.pad(weight_OI, (0, 0, 0, num_more)) if num_more else weight_OI  # padding by zero would copy too
    return padded.view(-1, _GROUP, num_in // unit, unit).transpose(1, 2).contiguous()


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    return packed.transpose(1, 2).flatten(2).flatten(0, 1)
