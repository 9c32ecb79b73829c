"""Rows of a step: few segments, each row in its own adapter's and no other's."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lorafleet.kernels.lora import LoraSegments
from lorafleet.workers.model.step_input import StepBuffers, StepInput
from lorafleet.workers.scheduling.adapter_slots import AdapterSlots
from lorafleet.workers.scheduling.block_pool import BlockPool
from lorafleet.workers.scheduling.request import GenerateRequest, Request
from lorafleet.workers.scheduling.sampling_options import SamplingOptions
from lorafleet.workers.scheduling.scheduler import Scheduler

PAGE = 4


class World:
    """A scheduler with all adapters in slots, and its steps as the model sees them."""

    def __init__(self, *adapters: str, max_num_tokens: int = 100) -> None:
        slots = AdapterSlots(len(adapters))
        for adapter in adapters:
            slots.start_load(adapter)
            slots.finish_load(adapter)
        self.scheduler = Scheduler(
            BlockPool(50),
            slots,
            page_size=PAGE,
            max_num_seqs=8,
            max_num_batched_tokens=max_num_tokens,
            eos_token_ids=frozenset(),
        )
        self.buffers, self.other = (
            StepBuffers(
                page_size=PAGE,
                max_num_tokens=max_num_tokens,
                max_num_seqs=8,
                max_model_len=64,
                max_composed=2,
                device=torch.device("cpu"),
            )
            for _ in range(2)
        )
        self.num_added = 0

    def add(
        self, length: int, adapter: str | None = None, start: int = 0, is_scored: bool = False, **fields: Any
    ) -> None:
        """Add a prompt unlike all others."""
        self.num_added += 1
        generate = GenerateRequest(
            f"{self.num_added}",
            (self.num_added,) * length,
            SamplingOptions(max_tokens=9, prompt_logprobs=0 if is_scored else None),
            adapter,
            adapter_start=start,
            **fields,
        )
        self.scheduler.add(Request.from_generate(generate, self.num_added))

    def step(self) -> StepInput:
        plan = self.scheduler.schedule()
        shape = self.buffers.fill(plan.scheduled)
        step = self.buffers.step(shape, with_tables=[0, 1])
        self._assert_another_rank_has_it(step, self.buffers.pack(shape))
        for entry in plan.scheduled:
            self.scheduler.commit(entry, 99 if entry.samples else None)
        return step

    def _assert_another_rank_has_it(self, step: StepInput, packed: npt.NDArray[np.int32]) -> None:
        other = self.other.step(self.other.unpack(packed), with_tables=[0, 1])
        assert other.own_tables == step.own_tables
        names = "token_ids_T", "positions_T", "slot_mapping_T", "query_start_S1", "context_len_S", "sample_rows"
        for name in (*names, "scored_rows"):
            assert torch.equal(getattr(other, name), getattr(step, name)), name
        for s, length in enumerate(step.context_len_S.tolist()):
            num_pages = -(-length // PAGE)
            assert torch.equal(other.page_table_SP[s, :num_pages], step.page_table_SP[s, :num_pages])
        if step.segments is None or other.segments is None:
            assert step.segments is other.segments
            return
        for name in step.segments.__slots__:
            assert torch.equal(getattr(other.segments, name), getattr(step.segments, name)), name


def segments(step: StepInput) -> list[tuple[int, int, int]]:
    """Return (first row, end row, slot) of each segment."""
    if step.segments is None:
        return []
    assert isinstance(step.segments, LoraSegments)
    columns = (step.segments.start_G, step.segments.end_G, step.segments.slot_G)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_rows_before_the_place_where_an_adapter_begins_are_in_no_segment() -> None:
    world = World("a", "b")
    world.add(5, "a")
    world.add(10, "a", start=6)
    world.add(3)
    world.add(8, "b", start=7)
    world.add(6, "a", start=1)
    step = world.step()
    # Base; a's, the one that begins later first: 6 + 4 rows, 1 + 5, 5; b's: 7 + 1.
    assert step.query_start_S1.tolist() == [0, 3, 13, 19, 24, 32]
    assert segments(step) == [(9, 13, 0), (14, 24, 0), (31, 32, 1)]
    assert segments(world.step()) == [(1, 4, 0), (4, 5, 1)], "single tokens are behind it"


def test_pieces_of_a_prompt_are_the_base_models_until_the_adapter_begins() -> None:
    world = World("a", max_num_tokens=8)
    world.add(20, "a", start=12)
    world.add(4, "a")
    assert segments(world.step()) == []
    assert segments(world.step()) == [(4, 8, 0)]
    assert segments(world.step()) == [(0, 8, 0)]
    assert segments(world.step()) == [(0, 2, 0)]


def test_a_compositions_rows_are_in_a_segment_of_each_of_its_adapters() -> None:
    world = World("a", "b")
    composed = (("b", 0.5), ("a", -2.0))
    world.add(3, composition=composed)
    world.add(2, "a")
    world.add(4, composition=composed)
    world.add(1, composition=(("a", 1.0), ("b", 0.5)))
    step = world.step()
    assert step.query_start_S1.tolist() == [0, 2, 5, 9, 10]
    assert segments(step) == [(0, 2, 0), (2, 9, 0), (2, 9, 1), (9, 10, 0), (9, 10, 1)]
    assert isinstance(step.segments, LoraSegments)
    assert step.segments.weight_G.tolist() == [1.0, -2.0, 0.5, 1.0, 0.5]
    world.add(5)
    assert segments(world.step()) == [(5, 6, 0), (6, 8, 0), (6, 8, 1), (8, 9, 0), (8, 9, 1)]


def test_scored_rows_are_those_before_a_prompts_other_tokens_each_with_its_own_adapters_head() -> None:
    world = World("a", "b", max_num_tokens=20)
    world.add(3, is_scored=True)
    world.add(6, "a", start=4, is_scored=True)
    world.add(5, "b", is_scored=True)
    world.add(9, "b", is_scored=True)
    step = world.step()
    assert step.query_start_S1.tolist() == [0, 3, 9, 14, 20]
    assert step.sample_rows.tolist() == [2, 8, 13]
    assert step.scored_rows.tolist() == [0, 1, *range(3, 8), *range(9, 13), *range(14, 20)]
    # Of "a" only the row after its start; then both prompts of "b", the second of which goes on.
    assert [(own.slot, own.scored) for own in step.own_tables] == [(0, slice(6, 7)), (1, slice(7, 17))]
    step = world.step()
    assert step.scored_rows.tolist() == [3, 4], "two of the last prompt's three tokens"
    assert [(own.slot, own.samples, own.scored) for own in step.own_tables] == [
        (0, slice(1, 2), slice(0, 0)),
        (1, slice(2, 4), slice(0, 2)),
    ]
    assert not len(world.step().scored_rows), "output is not scored"
