"""RMSNorm (Zhang & Sennrich 2019): y = x / sqrt(mean(x²) + eps) · w.

Computed in float32, rounded to x's dtype before the product with the weight, as transformers does.
T rows, H hidden.
"""

from __future__ import annotations

import torch

from lorafleet.kernels.native import DTYPE_CODES, library


def rms_norm(
    x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, out_TH: torch.Tensor | None = None
) -> torch.Tensor:
    """The norm of each row, in `out_TH` if that is given."""
    native = library()
    if native is None or x_TH.device.type != "cpu":
        out = rms_norm_reference(x_TH, weight_H, eps)
        return out if out_TH is None else out_TH.copy_(out)
    if out_TH is None:
        out_TH = torch.empty_like(x_TH)
    assert x_TH.is_contiguous() and out_TH.is_contiguous() and x_TH.dtype == weight_H.dtype == out_TH.dtype
    native.lf_rms_norm(
        DTYPE_CODES[x_TH.dtype],
        x_TH.data_ptr(),
        weight_H.data_ptr(),
        eps,
        out_TH.data_ptr(),
        x_TH.shape[0],
        x_TH.shape[1],
    )
    return out_TH


def fused_add_rms_norm_(x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> None:
    """residual += x; x = the norm of residual. Both in place."""
    native = library()
    if native is None or x_TH.device.type != "cpu":
        fused_add_rms_norm_reference_(x_TH, residual_TH, weight_H, eps)
        return
    assert x_TH.is_contiguous() and residual_TH.is_contiguous() and x_TH.shape == residual_TH.shape
    assert x_TH.dtype == residual_TH.dtype == weight_H.dtype
    native.lf_fused_add_rms_norm(
        DTYPE_CODES[x_TH.dtype],
        x_TH.data_ptr(),
        residual_TH.data_ptr(),
        weight_H.data_ptr(),
        eps,
        x_TH.shape[0],
        x_TH.shape[1],
    )


def rms_norm_reference(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    x = x_TH.float()
    x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return x.to(x_TH.dtype) * weight_H


def fused_add_rms_norm_reference_(
    x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
) -> None:
    residual_TH.add_(x_TH)
    x_TH.copy_(rms_norm_reference(residual_TH, weight_H, eps))
