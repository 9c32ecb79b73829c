"""One token per row: greedy, or drawn using temperature, min_p, top_k, top_p and the row's random number.

With temperature 0 it is the best token, the lowest id among equals. Otherwise, with d = (max(x) - x) / temperature in
float32 and weights w = exp(-d):
1. min_p drops every d > -log(min_p): tokens less likely than min_p times the best.
2. top_k keeps the first top_k in order of d, the lowest ids among equals.
3. top_p keeps, of the rest in the same order, the first token and all whose predecessors' weights sum to less than
   top_p of the total (nucleus sampling, Holtzman et al. 2020).
4. Of the remaining tokens in order of ids, the first is chosen whose cumulative weight exceeds the random number times
   the total: the inverse of the cumulative distribution.

Sums are float64. S rows that sample, V vocabulary, P rows that draw.
"""

from __future__ import annotations

import torch

from lorafleet.kernels.dispatch import uses_triton
from lorafleet.kernels.logit_changes import LogitChanges, change_logits_
from lorafleet.kernels.native import DTYPE_CODES, library


def sample_tokens(
    logits_SV: torch.Tensor,
    temperature_S: torch.Tensor,
    top_k_S: torch.Tensor,
    top_p_S: torch.Tensor,
    min_p_S: torch.Tensor,
    uniform_S: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (token ids [S] int64, finite [S] bool). Each row depends only on itself.

    Rows of logits, float32 or 16-bit, must be contiguous; they are not changed. temperature (0 is greedy), top_p (1
    keeps all) and min_p (0 keeps all) are float32, top_k (0 keeps all) is int64, uniform, in [0, 1), float64. A row
    with NaN or +inf, or with only -inf, is not finite; its token id is 0.
    """
    native = library()
    is_on_gpu = uses_triton(logits_SV.device)
    if native is None and not is_on_gpu:
        return sample_tokens_reference(logits_SV, temperature_S, top_k_S, top_p_S, min_p_S, uniform_S)
    rows, vocab_size = logits_SV.shape
    assert vocab_size > 0 and (logits_SV.stride(1) == 1 or vocab_size == 1)
    assert temperature_S.dtype == top_p_S.dtype == min_p_S.dtype == torch.float32
    assert top_k_S.dtype == torch.int64 and uniform_S.dtype == torch.float64
    columns = (temperature_S, top_k_S, top_p_S, min_p_S, uniform_S)
    assert all(column.shape == (rows,) and column.is_contiguous() for column in columns)
    token_ids_S = torch.empty(rows, dtype=torch.int64, device=logits_SV.device)
    finite_S = torch.empty(rows, dtype=torch.bool, device=logits_SV.device)
    if is_on_gpu:
        from lorafleet.kernels.gpu.sampling import sample_tokens as on_gpu

        on_gpu(logits_SV, *columns, token_ids_S, finite_S)
        return token_ids_S, finite_S
    native.lf_sample_tokens(
        DTYPE_CODES[logits_SV.dtype],
        logits_SV.data_ptr(),
        logits_SV.stride(0),
        *(column.data_ptr() for column in columns),
        token_ids_S.data_ptr(),
        finite_S.data_ptr(),
        rows,
        vocab_size,
    )
    return token_ids_S, finite_S


def sample_changed_tokens(
    logits_SV: torch.Tensor,
    temperature_S: torch.Tensor,
    top_k_S: torch.Tensor,
    top_p_S: torch.Tensor,
    min_p_S: torch.Tensor,
    uniform_S: torch.Tensor,
    changes: LogitChanges,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Like `sample_tokens`, but from changed logits; return possible [S] bool too.

    A row is not possible if it is not finite, or if its changes leave no token: its token id is 0.
    """
    # For rows that change only the finiteness of the first result is used.
    temperature = temperature_S.index_fill(0, changes.row_P, 0.0)
    token_ids_S, finite_S = sample_tokens(logits_SV, temperature, top_k_S, top_p_S, min_p_S, uniform_S)
    logits_PV = logits_SV[changes.row_P].float()
    change_logits_(logits_PV, changes)
    columns = (temperature_S, top_k_S, top_p_S, min_p_S, uniform_S)
    possible_S = finite_S.clone()
    token_ids_S[changes.row_P], possible_P = sample_tokens(logits_PV, *(column[changes.row_P] for column in columns))
    possible_S[changes.row_P] &= possible_P
    return token_ids_S, finite_S, possible_S


def sample_tokens_reference(
    logits_SV: torch.Tensor,
    temperature_S: torch.Tensor,
    top_k_S: torch.Tensor,
    top_p_S: torch.Tensor,
    min_p_S: torch.Tensor,
    uniform_S: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    logits_SV = logits_SV.float()
    best_S = logits_SV.amax(dim=1)  # NaN if the row holds one
    finite_S = best_S.isfinite()
    token_ids_S = logits_SV.argmax(dim=1).masked_fill_(~finite_S, 0)
    rows = (finite_S & (temperature_S > 0.0)).nonzero()[:, 0]
    if len(rows):
        scaled_PV = (logits_SV[rows] - best_S[rows, None]) / temperature_S[rows, None]
        scaled_PV.masked_fill_(scaled_PV < min_p_S[rows, None].log(), -torch.inf)
        cut = ((top_k_S[rows] > 0) | (top_p_S[rows] < 1.0)).nonzero()[:, 0]
        if len(cut):
            scaled_PV[cut] = _keep_top(scaled_PV[cut], top_k_S[rows[cut], None], top_p_S[rows[cut], None])
        cumulative_PV = scaled_PV.softmax(dim=1).double().cumsum(dim=1)
        total_P1 = cumulative_PV[:, -1:]
        # Rounding must not put a target at the total, which is past all tokens.
        target_P1 = torch.minimum(uniform_S[rows, None] * total_P1, total_P1.nextafter(torch.zeros_like(total_P1)))
        token_ids_S[rows] = torch.searchsorted(cumulative_PV, target_P1, right=True)[:, 0]
    return token_ids_S, finite_S


def _keep_top(scaled_PV: torch.Tensor, top_k_P1: torch.Tensor, top_p_P1: torch.Tensor) -> torch.Tensor:
    """Return the logits with everything outside top_k, then outside top_p of the rest, at -inf."""
    ordered_PV, index_PV = scaled_PV.sort(dim=1, descending=True, stable=True)
    place_V = torch.arange(scaled_PV.shape[1], device=scaled_PV.device)
    ordered_PV.masked_fill_((place_V >= top_k_P1) & (top_k_P1 > 0), -torch.inf)
    probability_PV = ordered_PV.softmax(dim=1).double()
    before_PV = probability_PV.cumsum(dim=1) - probability_PV
    ordered_PV.masked_fill_((before_PV >= top_p_P1) & (top_p_P1 < 1.0) & (place_V > 0), -torch.inf)
    return torch.empty_like(scaled_PV).scatter_(1, index_PV, ordered_PV)
