"""Which adapters requests may name, and the end of those that they may not name any more.

An adapter is registered, perhaps pinned, then retired, and freed when the last request for it has ended. Leaves to
others: its way into a slot (slot_loader.py), where it is (adapter_slots.py, adapters/store.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from lorafleet.workers.adapters.base_name import is_same_base
from lorafleet.workers.adapters.format import AdapterSpec, read_spec
from lorafleet.workers.adapters.sources import resolve_adapter
from lorafleet.workers.adapters.store import AdapterStore
from lorafleet.workers.config import EngineConfig
from lorafleet.workers.engine.adapter_slots import AdapterSlots
from lorafleet.workers.errors import (
    AdapterConflictError,
    AdapterRefusedError,
    AdapterUnavailableError,
    InternalError,
    UnknownModelError,
    quoted,
)
from lorafleet.workers.memory_plan import MemoryPlan
from lorafleet.workers.model.architecture import ModelSpec
from lorafleet.workers.model.loader import CheckpointReader
from lorafleet.workers.tp.followers import Followers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FreedBytes:
    """What unregistering an adapter gave back. device: a slot, for others, and what it had of the pool beside it."""

    device: int
    host: int


@dataclass(frozen=True, slots=True)
class Retire:
    """An adapter that is not registered any more, to be freed when the last request that names it has ended."""

    digest: str
    freed: Future[FreedBytes]


class RegisteredAdapters:
    """By digest. Whoever calls holds the engine's lock, unless a method says otherwise."""

    def __init__(
        self,
        config: EngineConfig,
        spec: ModelSpec,
        plan: MemoryPlan,
        store: AdapterStore,
        slots: AdapterSlots,
        followers: Followers,
    ) -> None:
        self._followers = followers
        self._config = config
        self._spec = spec
        self._plan = plan
        self._store = store
        self._slots = slots
        self._registered: set[str] = set()
        self._pinned: set[str] = set()  # of these, those that stay in their slots
        self._retiring: list[Retire] = []

    def read(self, path_or_id: str, roots: Sequence[str] | None) -> AdapterSpec:
        """Find, read and verify an adapter that is to be added. Without the lock: it is slow.

        roots: where it must lie, see `resolve_adapter`. Raises `AdapterRefusedError`.
        """
        lora = self._config.lora
        if lora is None:
            raise AdapterRefusedError(
                f"LoRA is off, so adapter {quoted(path_or_id)} cannot be used. Start with --enable-lora "
                "(enable_lora=True).",
                reason="lora_disabled",
            )
        folder = resolve_adapter(path_or_id, roots)
        spec = read_spec(
            folder,
            self._spec.base_shapes,
            max_lora_rank=lora.max_lora_rank,
            max_extra_vocab=lora.extra_vocab_size,
            base_rows=lambda name, rows: CheckpointReader(Path(self._config.model)).rows(name, rows),
        )
        if not is_same_base(self._config.model, spec.config.base_model_name):
            logger.warning(
                "adapter %s was trained for %r, by its config; it fits %r in its sizes, and is served on that",
                folder,
                spec.config.base_model_name,
                self._config.model,
            )
        num_bytes = self._plan.full_weight_bytes_of(self._spec, spec.vocabulary)
        if num_bytes > self._plan.full_weight_bytes:
            raise AdapterRefusedError(
                f"{folder} has {num_bytes} bytes of embedding, head or LoRA on them; the pool for such weights holds "
                f"{self._plan.full_weight_bytes}. Raise --lora-full-weight-bytes.",
                reason="larger_than_full_weight_pool",
            )
        self._followers.register(spec.path, spec.digest)
        return spec

    def add(self, spec: AdapterSpec) -> None:
        """Idempotent. Raises `AdapterRefusedError` when it does not fit into the host tier."""
        self._store.register(spec)
        self._registered.add(spec.digest)

    def remove(self, digest: str) -> Retire:
        """No request may name it from now on. Raises `UnknownModelError` for one that is not registered."""
        if digest not in self._registered:
            raise UnknownModelError(f"No adapter with digest {digest} is registered here.", param="model")
        self._registered.remove(digest)
        self._pinned.discard(digest)
        freed: Future[FreedBytes] = Future()
        freed.set_running_or_notify_cancel()  # nobody who waits can cancel it
        return Retire(digest, freed)

    def pin(self, digest: str, unfinished: Iterable[Sequence[str]]) -> None:
        """A slot is the adapter's own from now on. unfinished: digests of each request.

        Raises `AdapterConflictError` when the others would have too few slots.
        """
        self.check(digest)
        limit = self._plan.max_loras - 1
        if digest not in self._pinned and len(self._pinned) >= limit:
            raise AdapterConflictError(
                f"{len(self._pinned)} adapters are pinned; of {self._plan.max_loras} slots {limit} may be taken so. "
                "Raise --max-loras, or unload a pinned one."
            )
        pinned = self._pinned | {digest}
        if not all(self._fit(digests, pinned) for digests in unfinished):
            raise AdapterConflictError(
                "An unfinished request needs more slots for its adapters than another pinned one would leave. Pin "
                "it later, or raise --max-loras."
            )
        self._pinned = pinned

    def check(self, *digests: str) -> None:
        """That a request may name them. Raises `AdapterUnavailableError` or `AdapterConflictError`."""
        for digest in digests:
            if digest not in self._registered:
                raise unregistered(digest)
        if not self._fit(digests, self._pinned):
            raise AdapterConflictError(
                f"{len(digests)} adapters together never have a slot each: of {self._plan.max_loras} "
                f"{len(self._pinned)} are taken by pinned adapters."
            )

    def all(self) -> tuple[str, ...]:
        """The digests."""
        return tuple(self._registered)

    def spec(self, digest: str) -> AdapterSpec:
        """Without the lock. Raises `AdapterUnavailableError` for a digest that is not known (any more)."""
        spec = self._store.spec(digest)
        if spec is None:
            raise unregistered(digest)
        return spec

    def retire(self, retire: Retire) -> None:
        """The stepping thread's, without the lock: all requests that may name it are known to the scheduler."""
        self._slots.stay(retire.digest, False)
        self._retiring.append(retire)

    def free_unused(self, is_used: Callable[[str], bool]) -> list[tuple[Retire, FreedBytes]]:
        """The stepping thread's: empty the slots and the host memory of retired adapters that no request uses any more.

        One that is registered again keeps both.
        """
        freed = []
        for retire in list(self._retiring):
            if not is_used(retire.digest) and not self._slots.is_loading(retire.digest):
                self._retiring.remove(retire)
                freed.append((retire, self._free(retire.digest)))
        return freed

    def close(self, unseen: Iterable[Retire]) -> None:
        """Tell those who wait for bytes. unseen: what `retire` has not been told. Without the lock."""
        for retire in [*self._retiring, *unseen]:
            retire.freed.set_exception(InternalError("The engine is closed."))

    def check_integrity(self, unseen: Iterable[Retire]) -> None:
        """Nothing is resident that is neither registered nor about to be freed. For tests."""
        retiring = {retire.digest for retire in [*self._retiring, *unseen]}
        assert set(self._slots.resident()) <= self._registered | retiring

    def _free(self, digest: str) -> FreedBytes:
        if digest in self._registered or any(other.digest == digest for other in self._retiring):
            return FreedBytes(0, 0)
        pool_bytes = self._slots.drop(digest)
        device = 0 if pool_bytes is None else self._plan.slot_bytes + pool_bytes
        self._followers.forget(digest)
        return FreedBytes(device, self._store.forget(digest))

    def _fit(self, digests: Sequence[str], pinned: set[str]) -> bool:
        """Whether adapters can be in slots together, beside those that stay in theirs."""
        return len(pinned.union(digests)) <= self._plan.max_loras


def unregistered(digest: str) -> AdapterUnavailableError:
    return AdapterUnavailableError(
        f"No adapter with digest {digest} is registered here (any more). Name its model again.", param="model"
    )
