"""One rank's execution: weights, KV memory and slots, and one step over them.

Owns every tensor. Decides nothing: plans tell it what to run and where the data is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorafleet.kernels import native
from lorafleet.kernels.dispatch import uses_triton
from lorafleet.workers.adapters.format import HostAdapter
from lorafleet.workers.model.architecture import ModelSpec
from lorafleet.workers.model.decode_graphs import Capture, CudaCapture, DecodeGraphs, batch_sizes
from lorafleet.workers.model.decoder import Decoder
from lorafleet.workers.model.kv_cache import KVCache
from lorafleet.workers.model.layers import WeightFormat
from lorafleet.workers.model.loader import CheckpointReader
from lorafleet.workers.model.lora import SlotShape
from lorafleet.workers.model.memory_plan import MemoryPlan
from lorafleet.workers.model.rules.option_rules import option_rules
from lorafleet.workers.model.rules.rule import LogitRule
from lorafleet.workers.model.sampling import PendingSamples, Sampled, Sampler
from lorafleet.workers.model.side_stream import SideStream
from lorafleet.workers.model.slot_write import SlotWrite
from lorafleet.workers.model.step_input import StepBuffers, StepInput, StepShape
from lorafleet.workers.model.transfer import send
from lorafleet.workers.scheduling.batch import Scheduled, StepPlan
from lorafleet.workers.scheduling.request import MAX_COMPOSED, GenerateRequest, Request
from lorafleet.workers.scheduling.sampling_options import SamplingOptions
from lorafleet.workers.tp.group import TensorParallelGroup
from lorafleet.workers.tp.plans import Change, PlanChannel, Words


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """A launched step whose rows are not sampled yet."""

    logits_SV: torch.Tensor
    requests: list[Request]  # by row
    is_prepared: bool  # False: rules must know tokens that are pending

    def keep(self, holds: Callable[[Request], bool]) -> ForwardPass:
        """Return it without the rows of requests that have ended meanwhile."""
        kept = [row for row, request in enumerate(self.requests) if holds(request)]
        if len(kept) == len(self.requests):
            return self
        row_K = send(torch.tensor(kept, dtype=torch.int64), self.logits_SV.device)
        return replace(self, logits_SV=self.logits_SV[row_K], requests=[self.requests[row] for row in kept])


class ModelRunner:
    """The model on one device, sized by a memory plan.

    Rank 0's runner sends each step to the other ranks before it computes its own share; they `follow`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        memory: MemoryPlan,
        *,
        max_lora_rank: int,
        device: torch.device,
        group: TensorParallelGroup | None = None,
        plans: PlanChannel | None = None,
        enforce_eager: bool = False,
        rules: Sequence[LogitRule] = (),
    ) -> None:
        """plans: to the other ranks, for rank 0 of several. enforce_eager: launch steps op by op. rules: for sampling,
        beside those that need nothing but a request's options."""
        self._enforce_eager = enforce_eager
        group = group or TensorParallelGroup()
        self._plans = plans
        self._has_one_rank = group.size == 1
        self._changes: list[tuple[Change, int]] = []  # since the last step, for the other ranks
        dtype = getattr(torch, memory.dtype)
        self._memory = memory
        self._device = device
        format = WeightFormat(dtype, device, int8=memory.quantization == "int8")
        self._decoder = Decoder(
            spec,
            max_model_len=memory.max_model_len,
            max_num_tokens=memory.max_num_batched_tokens,
            format=format,
            group=group,
            enforce_eager=enforce_eager,
        )
        self._buffers = StepBuffers(
            page_size=memory.page_size,
            max_num_tokens=memory.max_num_batched_tokens,
            max_num_seqs=memory.max_num_seqs,
            max_model_len=memory.max_model_len,
            max_composed=max(1, min(MAX_COMPOSED, memory.max_loras)),
            device=device,
        )
        self._cache = KVCache(
            num_layers=spec.num_layers,
            num_pages=memory.num_pages + 1,  # the last one is for padding rows
            num_kv_heads=max(1, spec.num_kv_heads // group.size),
            page_size=memory.page_size,
            head_dim=spec.head_dim,
            dtype=dtype,
            device=device,
        )
        self._sampler = Sampler([*option_rules(spec.eos_token_ids, device), *rules])
        self._num_torch_threads: int | None = None  # in a step; None: the caller's number
        self._samples: PendingSamples | None = None  # of the last step
        self._sampled: dict[Request, int] = {}  # request → its index in `_samples`
        self._graphs: DecodeGraphs | None = None
        self._side_stream = SideStream(device) if device.type == "cuda" else None
        if memory.max_loras:
            shape = SlotShape(memory.max_loras, max_lora_rank, getattr(torch, memory.lora_dtype), device)
            self._decoder.add_slots(shape)

    def load(self, model_dir: Path) -> None:
        """Read the weights, and build the kernels if this machine has none yet. Raises `ModelError`."""
        self.load_weights(CheckpointReader(model_dir))

    def load_weights(self, reader: CheckpointReader) -> None:
        """`load` from a reader."""
        native.library()
        self._decoder.load(reader)

    def use_threads(self, count: int) -> None:
        """Compute the calling thread's steps with `count` host threads. The weights must be loaded.

        They are the kernels' threads, or torch's if torch computes the products: both sets would compete for the cores.
        """
        is_native = self._decoder.is_native
        native.set_threads(count if is_native else 1)
        self._num_torch_threads = 1 if is_native else count

    def warm_up(self) -> None:
        """Run a prompt and a single token, so that threads, buffers and code are ready for the first request.

        Uses the first pages, which must be free; what it writes there is never read.
        """
        if self._device.type == "cuda" and uses_triton(self._device) and self._has_one_rank and not self._enforce_eager:
            self.capture(CudaCapture())
        memory = self._memory
        num_tokens = min(
            64, max(1, memory.max_model_len - 1), memory.max_num_batched_tokens, memory.num_pages * memory.page_size
        )
        for length in (num_tokens, 1):
            generate = GenerateRequest("warm-up", (0,) * length, SamplingOptions(max_tokens=1))
            request = Request.from_generate(generate, arrival=0)
            request.pages = list(range(-(-length // memory.page_size)))
            self.run(StepPlan((Scheduled(request, length, slots=()),), loads=()))

    @torch.inference_mode()
    def capture(self, capture: Capture) -> None:
        """Record decode steps as graphs. The weights must be loaded; no request has begun and nothing else runs."""
        memory = self._memory
        sizes = batch_sizes(min(memory.max_num_seqs, memory.max_num_batched_tokens))
        decoder = self._decoder
        logits_SV = torch.empty(
            sizes[-1], decoder.spec.vocab_size, dtype=getattr(torch, memory.dtype), device=self._device
        )

        def forward(step: StepInput, logits_SV: torch.Tensor) -> None:
            decoder.forward(step, self._cache, logits_SV)

        has_lora = memory.max_loras > 0
        graphs = DecodeGraphs(forward, self._buffers, sizes, logits_SV, memory.num_pages, has_lora=has_lora)
        graphs.capture(capture)
        self._graphs = graphs

    @property
    def is_asynchronous(self) -> bool:
        """Return whether a step may be launched before the previous step's results are known."""
        return self._device.type == "cuda" and self._has_one_rank

    def run(self, plan: StepPlan) -> list[Sampled]:
        """Compute a non-empty plan; return one result per entry that samples, in the plan's order."""
        return self.launch(plan).results()

    def launch(self, plan: StepPlan) -> PendingSamples:
        """Launch a non-empty plan; return one pending result per entry that samples, in the plan's order.

        No rule may have to know a pending token.
        """
        return self.sample(self.forward(plan))

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> ForwardPass:
        """Launch a non-empty plan up to its logits.

        The last token of a request may still be pending from the previous launch; it is then taken from there.
        """
        requests = [entry.request for entry in plan.scheduled if entry.samples]
        is_prepared = self._sampler.prepare(requests, self._device)
        with _torch_threads(self._num_torch_threads):
            return ForwardPass(self.logits(plan), requests, is_prepared)

    @torch.inference_mode()
    def sample(self, forward: ForwardPass) -> PendingSamples:
        """Launch the sampling of a step, the last one launched; return one pending result per row."""
        requests = forward.requests
        with _torch_threads(self._num_torch_threads):
            if not forward.is_prepared:
                is_known = self._sampler.prepare(requests, self._device)
                assert is_known, "a rule must know tokens that are pending"
            samples = self._sampler.sample(forward.logits_SV, requests)
        self._samples = samples
        self._sampled = {request: number for number, request in enumerate(requests)}
        return samples

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> torch.Tensor:
        """Return logits [entries that sample, V] in the model's dtype; write keys and values of all scheduled tokens.

        Wider than the base's vocabulary if a row's adapter adds ids; those are -inf in other rows. Valid until the next
        step.
        """
        shape = self._buffers.fill(plan.scheduled)
        if self._plans is not None:
            self._plans.send(self._changes, self._buffers.pack(shape))
            self._changes.clear()

        def set_input(token_ids_T: torch.Tensor) -> None:
            self._take_pending(plan.scheduled, token_ids_T)

        decoder = self._decoder
        if self._graphs is not None and self._graphs.fits(plan.scheduled):
            slots = {slot for entry in plan.scheduled for slot in entry.slots}
            if decoder.with_norms.isdisjoint(slots) and slots.isdisjoint(decoder.tables):
                return self._graphs.run(shape, set_input)
        return self._forward(shape, set_input)

    @torch.inference_mode()
    def follow(self, step: Words) -> None:
        """Compute this rank's share of a step that rank 0 planned."""
        with _torch_threads(self._num_torch_threads):
            self._forward(self._buffers.unpack(step))

    def prepare_adapter(self, slot: int, adapter: HostAdapter) -> SlotWrite:
        """Prepare the write into a slot that no request uses. May run on another thread during `run`.

        The caller then advances the write between steps and finally passes it to `commit`.
        """
        write = self._decoder.prepare_adapter(slot, adapter)
        if self._side_stream is not None:
            self._side_stream.fill(write)
        return write

    def is_prepared(self, adapter: HostAdapter) -> bool:
        """Return whether `prepare_adapter` is nearly free, since an adapter of the same form was prepared before."""
        return self._decoder.is_prepared(adapter)

    def has_split_norms(self, adapter: HostAdapter) -> bool:
        """Return whether an adapter has DoRA norms that are sums over the ranks."""
        return bool(self._decoder.split_norms(adapter))

    def partial_squares(self, adapter: HostAdapter) -> torch.Tensor:
        """Return this rank's summands of the squares of such norms, [N, H] in float32."""
        return self._decoder.partial_squares(adapter)

    def split_norms(self, adapter: HostAdapter) -> torch.Tensor | None:
        """Return those norms, [N, H], if they are known."""
        norms = [adapter.norms.get(key) for key in self._decoder.split_norms(adapter)]
        known = [norm_H for norm_H in norms if norm_H is not None]
        return torch.stack(known) if known and len(known) == len(norms) else None

    def set_split_norms(self, adapter: HostAdapter, norms_NH: torch.Tensor) -> None:
        """Set those norms on this rank. Call before `prepare_adapter`, on every rank."""
        adapter.norms.update(zip(self._decoder.split_norms(adapter), norms_NH, strict=True))

    def commit(self, write: SlotWrite, number: int = 0) -> None:
        """Make a fully written adapter visible to steps, here and, under this number, on the other ranks."""
        write.commit()
        self._tell(Change.COMMIT, number)

    def clear_slot(self, slot: int) -> None:
        """Free an adapter's weights outside its slot: its embedding and head. No request may use it."""
        self._decoder.clear_slot(slot)
        self._tell(Change.CLEAR, slot)

    def close(self) -> None:
        """Tell the other ranks to end."""
        if self._plans is not None:
            self._plans.end()

    def table_bytes(self) -> int:
        """Return the bytes that adapters' embeddings and heads take."""
        return sum(part.num_bytes() for part in self._decoder.tables.values())

    def _forward(
        self, shape: StepShape, set_input: Callable[[torch.Tensor], None] = lambda token_ids_T: None
    ) -> torch.Tensor:
        decoder = self._decoder
        step = self._buffers.step(shape, with_norms=decoder.with_norms, with_tables=decoder.tables)
        set_input(step.token_ids_T)
        return decoder.forward(step, self._cache)

    def _take_pending(self, scheduled: Sequence[Scheduled], token_ids_T: torch.Tensor) -> None:
        """Replace the requests' last tokens, where only the device knows them, in the step's input."""
        rows, sources = [], []
        row = -1
        for entry in scheduled:
            row += entry.num_tokens
            if entry.request.num_pending_tokens:
                assert entry.samples and entry.request.num_pending_tokens == 1
                rows.append(row)
                sources.append(self._sampled[entry.request])
        if rows:
            assert self._samples is not None
            at = send(torch.tensor([rows, sources]), self._device)
            token_ids_T[at[0]] = self._samples.token_ids_S[at[1]]

    def _tell(self, change: Change, number: int) -> None:
        if self._plans is not None:
            self._changes.append((change, number))


@contextmanager
def _torch_threads(count: int | None) -> Iterator[None]:
    """Set torch's number of threads within the block; the calling thread may be a user's, with other work for torch."""
    kept = torch.get_num_threads()
    torch.set_num_threads(count or kept)
    try:
        yield
    finally:
        torch.set_num_threads(kept)
