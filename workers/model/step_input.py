"""A step plan as the tensors that the decoder and the sampler read. The only place where requests become rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorafleet.kernels.lora import LoraSegments
from lorafleet.workers.engine.scheduler import Scheduled

# T tokens of the step, S sequences in it, P pages of the longest sequence


@dataclass(frozen=True, slots=True)
class StepInput:
    """All of one step. Sequence s has the rows query_start[s] to query_start[s + 1]."""

    token_ids_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64
    slot_mapping_T: torch.Tensor  # int64: page * page_size + offset, where the token's key and value go
    page_table_SP: torch.Tensor  # int32, each sequence's pages in order; behind the last one undefined
    query_start_S1: torch.Tensor  # int32
    context_len_S: torch.Tensor  # int32: keys to attend to, this step's included
    sample_rows: torch.Tensor  # int64: rows whose logits are wanted
    segments: LoraSegments | None  # None: nobody in this step uses an adapter, no LoRA op runs


def build_step_input(scheduled: Sequence[Scheduled], page_size: int, device: torch.device) -> StepInput:
    """Lay out a non-empty plan that is grouped by adapter slot, as `StepPlan` promises."""
    num_tokens = sum(entry.num_tokens for entry in scheduled)
    num_pages = max(len(entry.request.pages) for entry in scheduled)
    token_ids = np.empty(num_tokens, np.int64)
    positions = np.empty(num_tokens, np.int64)
    slot_mapping = np.empty(num_tokens, np.int64)
    page_table = np.zeros((len(scheduled), num_pages), np.int32)
    query_start = np.zeros(len(scheduled) + 1, np.int32)
    context_len = np.empty(len(scheduled), np.int32)
    sample_rows: list[int] = []
    row = 0
    for s, entry in enumerate(scheduled):
        request = entry.request
        first = request.num_computed_tokens
        last = first + entry.num_tokens
        end = row + entry.num_tokens
        pages = page_table[s]
        pages[: len(request.pages)] = request.pages
        if entry.num_tokens == 1:
            token_ids[row] = request.token_ids[first]
            positions[row] = first
            slot_mapping[row] = pages[first // page_size] * page_size + first % page_size
        else:
            token_ids[row:end] = request.token_ids[first:last]
            own = positions[row:end]
            own[:] = np.arange(first, last)
            slot_mapping[row:end] = pages[own // page_size].astype(np.int64) * page_size + own % page_size
        context_len[s] = last
        query_start[s + 1] = end
        if entry.samples:
            sample_rows.append(end - 1)
        row = end
    return StepInput(
        token_ids_T=torch.from_numpy(token_ids).to(device),
        positions_T=torch.from_numpy(positions).to(device),
        slot_mapping_T=torch.from_numpy(slot_mapping).to(device),
        page_table_SP=torch.from_numpy(page_table).to(device),
        query_start_S1=torch.from_numpy(query_start).to(device),
        context_len_S=torch.from_numpy(context_len).to(device),
        sample_rows=torch.tensor(sample_rows, dtype=torch.int64, device=device),
        segments=_segments(scheduled, device),
    )


def _segments(scheduled: Sequence[Scheduled], device: torch.device) -> LoraSegments | None:
    starts: list[int] = []
    ends: list[int] = []
    slots: list[int] = []
    row = 0
    for entry in scheduled:
        end = row + entry.num_tokens
        if entry.slot is not None:
            if slots and slots[-1] == entry.slot:
                ends[-1] = end
            else:
                starts.append(row)
                ends.append(end)
                slots.append(entry.slot)
        row = end
    if not slots:
        return None
    columns = torch.tensor([starts, ends, slots], dtype=torch.int32).to(device)
    return LoraSegments(
        start_G=columns[0],
        end_G=columns[1],
        slot_G=columns[2],
        weight_G=torch.ones(len(slots), dtype=torch.float32, device=device),
    )
