"""One rank's executing half: weights, KV memory and slots, and one step over them.

Owns every tensor. Decides nothing: what to run and where it lies comes as a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from lorafleet.kernels import native
from lorafleet.kernels.dispatch import uses_triton
from lorafleet.workers.adapters.format import HostAdapter
from lorafleet.workers.engine.batch import Scheduled, StepPlan
from lorafleet.workers.engine.request import MAX_COMPOSED, GenerateRequest, Request
from lorafleet.workers.engine.sampling_options import SamplingOptions
from lorafleet.workers.memory_plan import MemoryPlan
from lorafleet.workers.model.architecture import ModelSpec
from lorafleet.workers.model.decode_graphs import Capture, CudaCapture, DecodeGraphs, batch_sizes
from lorafleet.workers.model.decoder import Decoder
from lorafleet.workers.model.kv_cache import KVCache
from lorafleet.workers.model.layers import WeightFormat
from lorafleet.workers.model.loader import CheckpointReader
from lorafleet.workers.model.lora import SlotShape
from lorafleet.workers.model.sampling import PendingSamples, Sampled, Sampler
from lorafleet.workers.model.side_stream import SideStream
from lorafleet.workers.model.slot_write import SlotWrite
from lorafleet.workers.model.step_input import StepBuffers, StepInput, StepShape
from lorafleet.workers.model.transfer import send
from lorafleet.workers.tp.group import TensorParallelGroup
from lorafleet.workers.tp.plans import Change, PlanChannel, Words


class ModelRunner:
    """The model on one device, its size fixed by a memory plan.

    Rank 0's runner tells the other ranks of each step before it computes its own share, and they `follow`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        plan: MemoryPlan,
        *,
        max_lora_rank: int,
        device: torch.device,
        group: TensorParallelGroup | None = None,
        plans: PlanChannel | None = None,
        enforce_eager: bool = False,
    ) -> None:
        """plans: to the other ranks, for rank 0 of several. enforce_eager: steps are launched op by op."""
        self._enforce_eager = enforce_eager
        group = group or TensorParallelGroup()
        self._plans = plans
        self._has_one_rank = group.size == 1
        self._changes: list[tuple[Change, int]] = []  # since the last step, for the other ranks
        dtype = getattr(torch, plan.dtype)
        self._plan = plan
        self._device = device
        format = WeightFormat(dtype, device, int8=plan.quantization == "int8")
        self._decoder = Decoder(
            spec,
            max_model_len=plan.max_model_len,
            max_num_tokens=plan.max_num_batched_tokens,
            format=format,
            group=group,
            enforce_eager=enforce_eager,
        )
        self._buffers = StepBuffers(
            page_size=plan.page_size,
            max_num_tokens=plan.max_num_batched_tokens,
            max_num_seqs=plan.max_num_seqs,
            max_model_len=plan.max_model_len,
            max_composed=max(1, min(MAX_COMPOSED, plan.max_loras)),
            device=device,
        )
        self._cache = KVCache(
            num_layers=spec.num_layers,
            num_pages=plan.num_pages + 1,  # the last one for rows that are nobody's
            num_kv_heads=max(1, spec.num_kv_heads // group.size),
            page_size=plan.page_size,
            head_dim=spec.head_dim,
            dtype=dtype,
            device=device,
        )
        self._sampler = Sampler(spec.eos_token_ids)
        self._num_torch_threads: int | None = None  # in a step; None: as many as the caller has
        self._samples: PendingSamples | None = None  # the last step's
        self._sampled: dict[Request, int] = {}  # whose they are
        self._graphs: DecodeGraphs | None = None
        self._side_stream = SideStream(device) if device.type == "cuda" else None
        if plan.max_loras:
            shape = SlotShape(plan.max_loras, max_lora_rank, getattr(torch, plan.lora_dtype), device)
            self._decoder.add_slots(shape)

    def load(self, model_dir: Path) -> None:
        """Read the weights, and build the kernels if this machine has none yet. Raises `ModelError`."""
        self.load_weights(CheckpointReader(model_dir))

    def load_weights(self, reader: CheckpointReader) -> None:
        """The same, from a reader."""
        native.library()
        self._decoder.load(reader)

    def use_threads(self, count: int) -> None:
        """Compute the calling thread's steps with so many threads of the host. The weights are loaded.

        The kernels' threads or, where products are torch's, torch's: those of both would fight for the cores.
        """
        is_native = self._decoder.is_native
        native.set_threads(count if is_native else 1)
        self._num_torch_threads = 1 if is_native else count

    def warm_up(self) -> None:
        """Run a prompt and a single token, so that the first request finds threads, buffers and code in place.

        Uses the first pages, which nobody may hold yet; what it writes there is never read.
        """
        if self._device.type == "cuda" and uses_triton(self._device) and self._has_one_rank and not self._enforce_eager:
            self.capture(CudaCapture())
        plan = self._plan
        num_tokens = min(
            64, max(1, plan.max_model_len - 1), plan.max_num_batched_tokens, plan.num_pages * plan.page_size
        )
        for length in (num_tokens, 1):
            generate = GenerateRequest("warm-up", (0,) * length, SamplingOptions(max_tokens=1))
            request = Request.from_generate(generate, arrival=0)
            request.pages = list(range(-(-length // plan.page_size)))
            self.run(StepPlan((Scheduled(request, length, slots=()),), loads=()))

    @torch.inference_mode()
    def capture(self, capture: Capture) -> None:
        """Record decode steps as graphs. The weights are loaded; no request has begun, and nothing else runs."""
        plan = self._plan
        sizes = batch_sizes(min(plan.max_num_seqs, plan.max_num_batched_tokens))
        decoder = self._decoder
        logits_SV = torch.empty(
            sizes[-1], decoder.spec.vocab_size, dtype=getattr(torch, plan.dtype), device=self._device
        )

        def forward(step: StepInput, logits_SV: torch.Tensor) -> None:
            decoder.forward(step, self._cache, logits_SV)

        has_lora = plan.max_loras > 0
        graphs = DecodeGraphs(forward, self._buffers, sizes, logits_SV, plan.num_pages, has_lora=has_lora)
        graphs.capture(capture)
        self._graphs = graphs

    @property
    def is_asynchronous(self) -> bool:
        """Whether a step may be launched before the results of the one before are known."""
        return self._device.type == "cuda" and self._has_one_rank

    def run(self, plan: StepPlan) -> list[Sampled]:
        """Compute a non-empty plan; one result for each entry that samples, in the plan's order."""
        return self.launch(plan).results()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingSamples:
        """Set a non-empty plan going; one result for each entry that samples, in the plan's order.

        The last token of a request may be pending, of the launch before this one; its place is taken from there.
        """
        requests = [entry.request for entry in plan.scheduled if entry.samples]
        with _torch_threads(self._num_torch_threads):
            samples = self._sampler.sample(self.logits(plan), requests)
        self._samples = samples
        self._sampled = {request: number for number, request in enumerate(requests)}
        return samples

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> torch.Tensor:
        """[entries that sample, V] in the model's dtype; keys and values of all scheduled tokens are written.

        Wider than the base's vocabulary where a row's adapter adds ids; those are -inf for the others. Good until the
        next step.
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
        """Compute this rank's share of a step that rank 0 has laid out."""
        with _torch_threads(self._num_torch_threads):
            self._forward(self._buffers.unpack(step))

    def prepare_adapter(self, slot: int, adapter: HostAdapter) -> SlotWrite:
        """Make ready what goes into a slot that no request uses. May run on another thread while `run` runs.

        Between steps the write is advanced, and in the end given to `commit`.
        """
        write = self._decoder.prepare_adapter(slot, adapter)
        if self._side_stream is not None:
            self._side_stream.fill(write)
        return write

    def is_prepared(self, adapter: HostAdapter) -> bool:
        """Whether `prepare_adapter` has next to nothing to do, since one that was saved alike was prepared before."""
        return self._decoder.is_prepared(adapter)

    def has_split_norms(self, adapter: HostAdapter) -> bool:
        """Whether DoRA's norms of an adapter are sums over the ranks."""
        return bool(self._decoder.split_norms(adapter))

    def partial_squares(self, adapter: HostAdapter) -> torch.Tensor:
        """Of an adapter with such norms, this rank's summands of their squares, [N, H] in float32."""
        return self._decoder.partial_squares(adapter)

    def split_norms(self, adapter: HostAdapter) -> torch.Tensor | None:
        """Those norms, [N, H], if they are known."""
        norms = [adapter.norms.get(key) for key in self._decoder.split_norms(adapter)]
        known = [norm_H for norm_H in norms if norm_H is not None]
        return torch.stack(known) if known and len(known) == len(norms) else None

    def set_split_norms(self, adapter: HostAdapter, norms_NH: torch.Tensor) -> None:
        """Before `prepare_adapter`, on every rank."""
        adapter.norms.update(zip(self._decoder.split_norms(adapter), norms_NH, strict=True))

    def commit(self, write: SlotWrite, number: int = 0) -> None:
        """Let the steps see an adapter of which all is in its slot, here and, under this number, on the other ranks."""
        write.commit()
        self._tell(Change.COMMIT, number)

    def clear_slot(self, slot: int) -> None:
        """Free what a slot's adapter has beyond the slot: its embedding and head. No request uses it."""
        self._decoder.clear_slot(slot)
        self._tell(Change.CLEAR, slot)

    def close(self) -> None:
        """Let the other ranks end."""
        if self._plans is not None:
            self._plans.end()

    def table_bytes(self) -> int:
        """Of the memory that adapters' embeddings and heads hold."""
        return sum(part.num_bytes() for part in self._decoder.tables.values())

    def _forward(
        self, shape: StepShape, set_input: Callable[[torch.Tensor], None] = lambda token_ids_T: None
    ) -> torch.Tensor:
        decoder = self._decoder
        step = self._buffers.step(shape, with_norms=decoder.with_norms, with_tables=decoder.tables)
        set_input(step.token_ids_T)
        return decoder.forward(step, self._cache)

    def _take_pending(self, scheduled: Sequence[Scheduled], token_ids_T: torch.Tensor) -> None:
        """Put tokens that only the device knows where the step reads them: the last ones of their requests."""
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
    """Within the block torch has so many threads: the calling thread may be a user's, who has other work for torch."""
    kept = torch.get_num_threads()
    torch.set_num_threads(count or kept)
    try:
        yield
    finally:
        torch.set_num_threads(kept)
