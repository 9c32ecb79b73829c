"""A rank above 0: its shard of the model and of the adapters, and steps as rank 0 lays them out. Decides nothing."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path

import torch

from lorafleet.workers.adapters.format import read_spec
from lorafleet.workers.config import EngineConfig
from lorafleet.workers.cores import claim_cores
from lorafleet.workers.errors import AdapterRefusedError
from lorafleet.workers.memory_plan import MemoryPlan
from lorafleet.workers.model.adapter_shard import adapter_store
from lorafleet.workers.model.architecture import ModelSpec
from lorafleet.workers.model.loader import CheckpointReader
from lorafleet.workers.model.runner import ModelRunner
from lorafleet.workers.model.slot_write import SlotWrite
from lorafleet.workers.tp.group import TensorParallelGroup
from lorafleet.workers.tp.plans import Change, PlanChannel

_COPY_BYTES = 128 << 10


class Follower:
    """`run` on one thread makes the steps; all else may be called from others meanwhile."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        spec: ModelSpec,
        plan: MemoryPlan,
        device: torch.device,
        group: TensorParallelGroup,
        plans: PlanChannel,
    ) -> None:
        """plan: rank 0's."""
        self._config = config
        self._spec = spec
        self._plans = plans
        self._is_on_cpu = device.type == "cpu"
        max_lora_rank = config.lora.max_lora_rank if config.lora else 0
        self._runner = ModelRunner(
            spec,
            plan,
            max_lora_rank=max_lora_rank,
            device=device,
            group=group,
            enforce_eager=config.enforce_eager,
        )
        self._store = adapter_store(spec, plan, group, read_timeout_s=config.adapter_read_timeout_s)
        self._lock = threading.Lock()
        # By slot: the number of the load and what is in place, until rank 0 says that it counts. The next load for the
        # slot takes its place: then rank 0 has given the slot to another adapter without a step in between.
        self._staged: dict[int, tuple[int, SlotWrite]] = {}

    def load(self) -> None:
        """Read this rank's share of the weights. Raises `ModelError`."""
        self._runner.load(Path(self._config.model))

    def register(self, path: Path, digest: str) -> None:
        """Know an adapter as rank 0 does. Raises `AdapterRefusedError`, also when it reads otherwise here."""
        assert self._config.lora is not None
        if self._store.spec(digest) is not None:
            return
        spec = read_spec(
            path,
            self._spec.base_shapes,
            max_lora_rank=self._config.lora.max_lora_rank,
            max_extra_vocab=self._config.lora.extra_vocab_size,
            base_rows=lambda name, rows: CheckpointReader(Path(self._config.model)).rows(name, rows),
        )
        if spec.digest != digest:
            raise AdapterRefusedError(
                f"The adapter reads as {spec.digest} on another rank of this worker and as {digest} on the first. Is "
                "it the same directory on all nodes?",
                reason="changed_while_read",
            )
        with self._lock:
            if self._store.spec(digest) is None:  # else another call was faster
                self._store.register(spec)
                self._store.hold_files(digest)

    def forget(self, digest: str) -> None:
        with self._lock:
            if self._store.spec(digest) is not None:
                self._store.release_files(digest)
                self._store.forget(digest)

    def prefetch(self, digest: str) -> None:
        self._store.prefetch(digest)

    def partial_squares(self, path: Path, digest: str) -> torch.Tensor:
        """See `ModelRunner.partial_squares`. Raises what `stage` raises."""
        self.register(path, digest)
        adapter = self._store.fetch(digest).result()
        try:
            return self._runner.partial_squares(adapter)
        finally:
            self._store.release(digest)

    def stage(self, path: Path, digest: str, slot: int, number: int, norms_NH: torch.Tensor | None = None) -> None:
        """Put an adapter's shard into a slot that no request uses. Raises `AdapterUnavailableError` and the like."""
        self.register(path, digest)
        adapter = self._store.fetch(digest).result()
        try:
            if norms_NH is not None:
                self._runner.set_split_norms(adapter, norms_NH)
            write = self._runner.prepare_adapter(slot, adapter)
            while not write.advance(_COPY_BYTES):
                pass
        finally:
            self._store.release(digest)
        with self._lock:
            self._staged[slot] = number, write

    def run(self) -> None:
        """Follow rank 0 until it ends. Raises `RuntimeError` when a rank is lost."""
        num_threads = self._config.threads
        with closing(claim_cores(num_threads if self._is_on_cpu else 0)) as cores:
            cores.pin_thread()
            self._runner.use_threads(num_threads)
            while (plan := self._plans.receive()) is not None:
                for change, number in plan.changes:
                    if change is Change.COMMIT:
                        self._commit(number)
                    else:
                        self._runner.clear_slot(number)
                self._runner.follow(plan.step)

    def close(self) -> None:
        self._store.close()

    def _commit(self, number: int) -> None:
        with self._lock:
            slot = next((slot for slot, (staged, _) in self._staged.items() if staged == number), None)
            write = None if slot is None else self._staged.pop(slot)[1]
        if write is not None:
            self._runner.commit(write)
