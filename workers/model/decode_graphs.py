"""Decode steps as CUDA graphs: all launches of a step, recorded once for a batch size and replayed as one.

A graph reads its input where `StepBuffers` puts it and writes logits to one place, so that only the content differs
between replays. There are graphs for some batch sizes; a batch is filled up to the next one with rows that harm
nothing. For each size there is one with LoRA in it and one without, which a batch of base model requests takes.

What a graph cannot hold runs as usual: prompts, adapters with norms, an embedding or a head of their own (other
launches for each), compositions (more pieces than rows), and all with several ranks.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from lorafleet.workers.model.step_input import StepBuffers, StepInput, StepShape
from lorafleet.workers.scheduling.batch import Scheduled

_MAX_SIZE = 256  # larger batches spend little of their time in launches


class Capture(Protocol):
    """Records what a function launches; what it returns launches it again."""

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]: ...


class CudaCapture:
    """CUDA graphs with one pool of memory for all: no two of them run at a time.

    `torch.cuda.graph` would look for garbage before each of them, which takes longer than the recording. It must not
    be looked for amid one, since what is freed may be the device's.
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
    """Those that have graphs, ascending: the larger, the farther apart, since a row more costs ever less."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, _MAX_SIZE + 1, 32)]
    largest = min(max_num_seqs, _MAX_SIZE)
    return [*(size for size in sizes if size < largest), largest]


class DecodeGraphs:
    """The graphs of one model. `capture` makes them; then `run` replays one for each step that fits."""

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
        """forward: a step, and where its logits go. logits_SV: for the largest size. scratch_page: nobody's."""
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
        """Record all graphs, the largest first: the others find its memory. Nothing else may run."""
        nothing = StepShape(0, 0, 0, 0, 0)
        for has_lora in self._variants:
            for size in reversed(self._sizes):
                step = self._buffers.decode_step(nothing, size, self._scratch_page, has_lora=has_lora)
                logits_SV = self._logits_SV[:size]

                def run(step: StepInput = step, logits_SV: torch.Tensor = logits_SV) -> None:
                    self._forward(step, logits_SV)

                run()  # compiles kernels and makes what libraries make at their first call, which no graph can hold
                self._replays[size, has_lora] = capture(run)

    def fits(self, scheduled: Sequence[Scheduled]) -> bool:
        """Whether a step without norms or tables of adapters has a graph."""
        if not self._replays or len(scheduled) > self._sizes[-1]:
            return False
        return all(entry.num_tokens == 1 and entry.samples and len(entry.slots) <= 1 for entry in scheduled)

    def run(self, shape: StepShape, set_input: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """Logits of a step that the buffers hold and that fits; good until the next one.

        set_input: called with the step's token ids on the device, which it may replace.
        """
        size = next(size for size in self._sizes if size >= shape.num_seqs)
        has_lora = shape.num_segments > 0
        step = self._buffers.decode_step(shape, size, self._scratch_page, has_lora=has_lora)
        set_input(step.token_ids_T)
        self._replays[size, has_lora]()
        return self._logits_SV[: shape.num_seqs]
