"""Decode steps as CUDA graphs: all launches of a step, recorded once per batch size and replayed as one.

A graph reads its input from `StepBuffers`' fixed addresses and writes logits to a fixed place, so replays differ only
in content. Graphs exist for some batch sizes; a batch is padded to the next size with harmless rows. Each size has one
graph with LoRA and one without, for batches of base model requests only.

Steps that no graph can hold run as usual: prompts; adapters with norms, an embedding or a head of their own (each needs
other launches); compositions (more pieces than rows); and everything with several ranks.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from lorafleet.workers.model.step_input import StepBuffers, StepInput, StepShape
from lorafleet.workers.scheduling.batch import Scheduled

_MAX_SIZE = 256  # larger batches spend little time on launches


class Capture(Protocol):
    """Records the launches of a function; returns a function that repeats them."""

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]: ...


class CudaCapture:
    """CUDA graphs with one memory pool for all, since no two of them run at once.

    `torch.cuda.graph` would collect garbage before each recording, which takes longer than the recording. Garbage must
    not be collected during a recording, since it may free device memory.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        is_collecting = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    run()
                finally:
                    graph.capture_end()
        finally:
            if is_collecting:
                gc.enable()
        replay: Callable[[], None] = graph.replay
        return replay


def batch_sizes(max_num_seqs: int) -> list[int]:
    """Return the sizes with graphs, ascending and increasingly far apart: an extra row costs less in larger batches."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, _MAX_SIZE + 1, 32)]
    largest = min(max_num_seqs, _MAX_SIZE)
    return [*(size for size in sizes if size < largest), largest]


class DecodeGraphs:
    """The graphs of one model: `capture` records them, then `run` replays one for each step that fits."""

    def __init__(
        self,
        forward: Callable[[StepInput, torch.Tensor], None],
        buffers: StepBuffers,
        sizes: Sequence[int],
        logits_SV: torch.Tensor,
        scratch_page: int,
        *,
        has_lora: bool,
    ) -> None:
        """forward: runs a step and writes its logits. logits_SV: for the largest size. scratch_page: in no request."""
        self._forward = forward
        self._buffers = buffers
        self._sizes = sorted(sizes)
        self._logits_SV = logits_SV
        self._scratch_page = scratch_page
        self._variants = (True, False) if has_lora else (False,)
        self._replays: dict[tuple[int, bool], Callable[[], None]] = {}

    def __len__(self) -> int:
        return len(self._replays)

    def capture(self, capture: Capture) -> None:
        """Record all graphs, the largest first, so that the others reuse its memory. Nothing else may run."""
        nothing = StepShape()
        for has_lora in self._variants:
            for size in reversed(self._sizes):
                step = self._buffers.decode_step(nothing, size, self._scratch_page, has_lora=has_lora)
                logits_SV = self._logits_SV[:size]

                def run(step: StepInput = step, logits_SV: torch.Tensor = logits_SV) -> None:
                    self._forward(step, logits_SV)

                run()  # compiles kernels and lets libraries initialise, which no graph can hold
                self._replays[size, has_lora] = capture(run)

    def fits(self, scheduled: Sequence[Scheduled]) -> bool:
        """Return whether a step without adapters' own norms or tables has a graph."""
        if not self._replays or len(scheduled) > self._sizes[-1]:
            return False
        return all(entry.num_tokens == 1 and entry.samples and len(entry.slots) <= 1 for entry in scheduled)

    def run(self, shape: StepShape, set_input: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """Return the logits of a step that is in the buffers and fits; valid until the next step.

        set_input: called with the step's token ids on the device, which it may replace.
        """
        size = next(size for size in self._sizes if size >= shape.num_seqs)
        has_lora = shape.num_segments > 0
        step = self._buffers.decode_step(shape, size, self._scratch_page, has_lora=has_lora)
        set_input(step.token_ids_T)
        self._replays[size, has_lora]()
        return self._logits_SV[: shape.num_seqs]
