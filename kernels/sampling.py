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

import ctypes
from typing import Final

import torch

from lorafleet.kernels.dispatch import uses_triton
from lorafleet.kernels.logit_changes import LogitChanges, NativeChanges, change_logits_
from lorafleet.kernels.native import DTYPE_CODES, library

Columns = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
_COLUMN_DTYPES: Final = [torch.float32, torch.int64, torch.float32, torch.float32, torch.float64]


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
    columns = (temperature_S, top_k_S, top_p_S, min_p_S, uniform_S)
    is_on_gpu = uses_triton(logits_SV.device)
    if not is_on_gpu and library() is None:
        return sample_tokens_reference(logits_SV, *columns)
    _check(logits_SV, *columns)
    token_ids_S, finite_S = _results(logits_SV)
    if is_on_gpu:
        from lorafleet.kernels.gpu.sampling import sample_tokens as on_gpu

        on_gpu(logits_SV, *columns, token_ids_S, finite_S)
    else:
        _sample_natively(logits_SV, columns, token_ids_S, finite_S)
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

    `finite` is of the logits before their changes. A row is not possible if it is not finite, or if its changes leave
    no token; its token id is 0.
    """
    columns = (temperature_S, top_k_S, top_p_S, min_p_S, uniform_S)
    if uses_triton(logits_SV.device) or library() is None:
        return _sample_changed_apart(logits_SV, columns, changes)
    _check(logits_SV, *columns)
    token_ids_S, finite_S = _results(logits_SV)
    possible_S = torch.empty_like(finite_S)
    _sample_natively(logits_SV, columns, token_ids_S, finite_S, possible_S, NativeChanges(changes, len(logits_SV)))
    return token_ids_S, finite_S, possible_S


def _sample_changed_apart(
    logits_SV: torch.Tensor, columns: Columns, changes: LogitChanges
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sample a copy of the rows that change by themselves."""
    row_P, temperature_S = changes.row_P, columns[0]
    # For rows that change only the finiteness of the first result is used.
    token_ids_S, finite_S = sample_tokens(logits_SV, temperature_S.index_fill(0, row_P, 0.0), *columns[1:])
    logits_PV = logits_SV[row_P].float()
    change_logits_(logits_PV, changes)
    token_ids_P, possible_P = sample_tokens(logits_PV, *(column[row_P] for column in columns))
    possible_P &= finite_S[row_P]
    possible_S = finite_S.clone()
    possible_S[row_P] = possible_P
    token_ids_S[row_P] = token_ids_P.masked_fill_(~possible_P, 0)
    return token_ids_S, finite_S, possible_S


def _check(logits_SV: torch.Tensor, *columns: torch.Tensor) -> None:
    rows, vocab_size = logits_SV.shape
    assert vocab_size > 0 and (logits_SV.stride(1) == 1 or vocab_size == 1)
    assert [column.dtype for column in columns] == _COLUMN_DTYPES
    assert all(column.shape == (rows,) and column.is_contiguous() for column in columns)


def _results(logits_SV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, device = len(logits_SV), logits_SV.device
    return torch.empty(rows, dtype=torch.int64, device=device), torch.empty(rows, dtype=torch.bool, device=device)


def _sample_natively(
    logits_SV: torch.Tensor,
    columns: Columns,
    token_ids_S: torch.Tensor,
    finite_S: torch.Tensor,
    possible_S: torch.Tensor | None = None,
    changes: NativeChanges | None = None,
) -> None:
    library().lf_sample_tokens(
        DTYPE_CODES[logits_SV.dtype],
        logits_SV.data_ptr(),
        logits_SV.stride(0),
        *(column.data_ptr() for column in columns),
        None if changes is None else ctypes.addressof(changes),
        token_ids_S.data_ptr(),
        finite_S.data_ptr(),
        None if possible_S is None else possible_S.data_ptr(),
        *logits_SV.shape,
    )


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
