"""RMSNorm (Zhang & Sennrich 2019): y = x / sqrt(mean(x²) + eps) · w.

Computed in float32, rounded to x's dtype before the product with the weight, as in transformers.
A row may have its own weight (an adapter's): there are then W weights, and `which_T` has each row's index.
T rows, H hidden, W weights.
"""

from __future__ import annotations

import torch

from lorafleet.kernels.dispatch import uses_triton
from lorafleet.kernels.native import DTYPE_CODES, library


def rms_norm(
    x_TH: torch.Tensor,
    weight_WH: torch.Tensor,
    eps: float,
    out_TH: torch.Tensor | None = None,
    which_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return each row's norm, in `out_TH` if given. which_T: int32; None: the first weight, or the only one, [H]."""
    native = library()
    is_on_gpu = uses_triton(x_TH.device)
    if native is None and not is_on_gpu:
        out = rms_norm_reference(x_TH, weight_WH, eps, which_T)
        return out if out_TH is None else out_TH.copy_(out)
    if out_TH is None:
        out_TH = torch.empty_like(x_TH)
    assert x_TH.is_contiguous() and out_TH.is_contiguous() and x_TH.dtype == weight_WH.dtype == out_TH.dtype
    assert weight_WH.is_contiguous() and (which_T is None or which_T.dtype == torch.int32)
    if is_on_gpu:
        from lorafleet.kernels.gpu.norm import rms_norm as on_gpu

        on_gpu(x_TH, weight_WH, eps, out_TH, which_T)
        return out_TH
    native.lf_rms_norm(
        DTYPE_CODES[x_TH.dtype],
        x_TH.data_ptr(),
        weight_WH.data_ptr(),
        None if which_T is None else which_T.data_ptr(),
        eps,
        out_TH.data_ptr(),
        x_TH.shape[0],
        x_TH.shape[1],
    )
    return out_TH


def fused_add_rms_norm_(
    x_TH: torch.Tensor,
    residual_TH: torch.Tensor,
    weight_WH: torch.Tensor,
    eps: float,
    which_T: torch.Tensor | None = None,
) -> None:
    """Compute residual += x, then x = the norm of residual. Both in place."""
    native = library()
    is_on_gpu = uses_triton(x_TH.device)
    if native is None and not is_on_gpu:
        fused_add_rms_norm_reference_(x_TH, residual_TH, weight_WH, eps, which_T)
        return
    assert x_TH.is_contiguous() and residual_TH.is_contiguous() and x_TH.shape == residual_TH.shape
    assert x_TH.dtype == residual_TH.dtype == weight_WH.dtype
    assert weight_WH.is_contiguous() and (which_T is None or which_T.dtype == torch.int32)
    if is_on_gpu:
        from lorafleet.kernels.gpu.norm import fused_add_rms_norm_ as on_gpu

        on_gpu(x_TH, residual_TH, weight_WH, eps, which_T)
        return
    native.lf_fused_add_rms_norm(
        DTYPE_CODES[x_TH.dtype],
        x_TH.data_ptr(),
        residual_TH.data_ptr(),
        weight_WH.data_ptr(),
        None if which_T is None else which_T.data_ptr(),
        eps,
        x_TH.shape[0],
        x_TH.shape[1],
    )


def rms_norm_reference(
    x_TH: torch.Tensor, weight_WH: torch.Tensor, eps: float, which_T: torch.Tensor | None = None
) -> torch.Tensor:
    x = x_TH.float()
    x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return x.to(x_TH.dtype) * _weight_of_rows(x_TH, weight_WH, which_T)


def _weight_of_rows(x_TH: torch.Tensor, weight_WH: torch.Tensor, which_T: torch.Tensor | None) -> torch.Tensor:
    """Return the rows' weights, broadcast over a dimension of heads between rows and features."""
    if which_T is not None:
        return weight_WH[which_T].view(-1, *(1,) * (x_TH.dim() - 2), weight_WH.shape[1])
    return weight_WH if weight_WH.dim() == 1 else weight_WH[0]


def fused_add_rms_norm_reference_(
    x_TH: torch.Tensor,
    residual_TH: torch.Tensor,
    weight_WH: torch.Tensor,
    eps: float,
    which_T: torch.Tensor | None = None,
) -> None:
    residual_TH.add_(x_TH)
    x_TH.copy_(rms_norm_reference(residual_TH, weight_WH, eps, which_T))
