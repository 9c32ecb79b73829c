"""Which adapters requests may name, and the end of those that they may not name any more.

An adapter is registered, perhaps pinned, then retired, and freed when the last request for it has ended. Pinned ones
keep their slot and what they have of the pool beside the slots; a request that would never have room beside them is
refused, and so is a pin that would leave an accepted one none. Leaves to others: an adapter's way into a slot
(slot_loader.py), where it is (adapter_slots.py, adapters/store.py).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import filterfalse, islice
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
    LoRAFleetError,
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

    MAX_FREED = 32  # in one step

    def __init__(
        self,
        config: EngineConfig,
        *,
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
        self._bytes: dict[str, int] = {}  # of these and of retired ones, what they take of the pool beside the slots
        self._pinned: set[str] = set()  # of these, those that stay in their slots
        self._users: Counter[str] = Counter()  # unfinished requests that name each
        self._retiring: dict[str, list[Retire]] = {}
        self._unused: dict[str, None] = {}  # of these, those that no request names; a set in order

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
        num_bytes = self._pool_bytes(spec)
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
        self._bytes[spec.digest] = self._pool_bytes(spec)

    def remove(self, digest: str) -> Retire:
        """No request may name it from now on. Raises `UnknownModelError` for one that is not registered."""
        if digest not in self._registered:
            raise UnknownModelError(f"No adapter with digest {digest} is registered here.", param="model")
        self._registered.remove(digest)
        self._pinned.discard(digest)
        freed: Future[FreedBytes] = Future()
        freed.set_running_or_notify_cancel()  # nobody who waits can cancel it
        return Retire(digest, freed)

    def repin(
        self, pin: Collection[str], unpin: Collection[str], unfinished: Iterable[Sequence[str]]
    ) -> list[tuple[str, bool]]:
        """Let some adapters keep their slots from now on, in place of others. unfinished: digests of each request.

        Returns what changes: (digest, whether it is pinned). Raises `AdapterConflictError`, and changes nothing, when
        the others would have too little room.
        """
        self.check(*pin, pinned=set())
        pinned = self._pinned.difference(unpin).union(pin)
        if pinned - self._pinned:
            self._check_pins(pinned, unfinished)
        changes = [(digest, False) for digest in sorted(self._pinned - pinned)]
        changes += [(digest, True) for digest in sorted(pinned - self._pinned)]
        self._pinned = pinned
        return changes

    def check(self, *digests: str, pinned: set[str] | None = None) -> None:
        """That a request may name them, beside the pinned ones. Raises `AdapterUnavailableError` or
        `AdapterConflictError`."""
        for digest in digests:
            if digest not in self._registered:
                raise unregistered(digest)
        pinned = self._pinned if pinned is None else pinned
        if not self._have_slots(digests, pinned):
            raise AdapterConflictError(
                f"{len(digests)} adapters together never have a slot each: of {self._plan.max_loras} "
                f"{len(pinned)} are taken by pinned adapters. Unload a pinned one, or raise --max-loras."
            )
        if not self._have_pool(digests, pinned):
            raise AdapterConflictError(
                f"An embedding or head of {self._pool_of(digests)} bytes never has room beside those of pinned "
                f"adapters, which have {self._pool_of(pinned)} of {self._plan.full_weight_bytes}. Unload a pinned one, "
                "or raise --lora-full-weight-bytes."
            )

    def use(self, digests: Iterable[str]) -> None:
        """One more request that names these has been accepted."""
        self._users.update(digests)

    def leave(self, digests: Iterable[str]) -> None:
        """A request that named these has ended."""
        for digest in digests:
            self._users[digest] -= 1
            if not self._users[digest]:
                del self._users[digest]
                if digest in self._retiring:
                    self._unused[digest] = None

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
        """The stepping thread's, with or without the lock: all that was asked before it is done."""
        self._slots.stay(retire.digest, False)
        self._retiring.setdefault(retire.digest, []).append(retire)
        if retire.digest not in self._users:
            self._unused[retire.digest] = None

    def can_free(self, is_coming: Callable[[str], bool]) -> bool:
        """Whether `free_unused` would free something."""
        return not all(map(is_coming, self._unused))

    def free_unused(self, is_coming: Callable[[str], bool]) -> list[tuple[Retire, FreedBytes]]:
        """The stepping thread's: empty the slots and the host memory of retired adapters that no request uses any more.

        One that is registered again keeps both. At most so many at a time that the step stays short. is_coming: an
        adapter that is on its way into a slot is freed when it is there.
        """
        freed = []
        for digest in list(islice(filterfalse(is_coming, self._unused), self.MAX_FREED)):
            if digest in self._users:  # registered again, and named
                del self._unused[digest]
            else:
                del self._unused[digest]
                retires = self._retiring.pop(digest)
                num_bytes = FreedBytes(0, 0) if digest in self._registered else self._free(digest)
                freed += [(retire, FreedBytes(0, 0)) for retire in retires[:-1]]
                freed.append((retires[-1], num_bytes))
        return freed

    def close(self, unseen: Iterable[Retire], error: LoRAFleetError) -> None:
        """Tell those who wait for bytes that nobody frees any. unseen: what `retire` has not been told."""
        waiting = [retire for retires in self._retiring.values() for retire in retires]
        self._retiring.clear()
        self._unused.clear()
        for retire in [*waiting, *unseen]:
            retire.freed.set_exception(error)

    def check_integrity(self, unseen: Iterable[Retire]) -> None:
        """Nothing is resident that is neither registered nor about to be freed. For tests."""
        retiring = {*self._retiring, *(retire.digest for retire in unseen)}
        assert set(self._slots.resident()) <= self._registered | retiring
        assert self._unused.keys() <= self._retiring.keys()
        assert self._bytes.keys() == self._registered | retiring
        assert self._pinned <= self._registered
        assert self._pool_of(self._pinned) <= self._plan.full_weight_bytes

    def _free(self, digest: str) -> FreedBytes:
        pool_bytes = self._slots.drop(digest)
        device = 0 if pool_bytes is None else self._plan.slot_bytes + pool_bytes
        self._followers.forget(digest)
        del self._bytes[digest]
        return FreedBytes(device, self._store.forget(digest))

    def _check_pins(self, pinned: set[str], unfinished: Iterable[Sequence[str]]) -> None:
        limit = self._plan.max_loras - 1
        if len(pinned) > limit:
            raise AdapterConflictError(
                f"{len(self._pinned)} adapters are pinned; of {self._plan.max_loras} slots {limit} may be taken so. "
                "Raise --max-loras, or unload a pinned one."
            )
        if self._pool_of(pinned) > self._plan.full_weight_bytes:
            raise AdapterConflictError(
                f"Embeddings and heads of pinned adapters would take {self._pool_of(pinned)} bytes, the pool for them "
                f"has {self._plan.full_weight_bytes}. Raise --lora-full-weight-bytes, or unload a pinned one."
            )
        for digests in unfinished:
            if not self._have_slots(digests, pinned):
                raise AdapterConflictError(
                    "An unfinished request needs more slots for its adapters than another pinned one would leave. Pin "
                    "it later, or raise --max-loras."
                )
            if not self._have_pool(digests, pinned):
                raise AdapterConflictError(
                    "An unfinished request's embedding or head needs more room than another pinned one would leave. "
                    "Pin it later, or raise --lora-full-weight-bytes."
                )

    def _have_slots(self, digests: Sequence[str], pinned: set[str]) -> bool:
        """Whether adapters can be in slots together, beside those that stay in theirs."""
        return len(pinned.union(digests)) <= self._plan.max_loras

    def _have_pool(self, digests: Sequence[str], pinned: set[str]) -> bool:
        """Whether their embeddings and heads can be in the pool together, beside those that stay there."""
        return not self._pool_of(digests) or self._pool_of(pinned.union(digests)) <= self._plan.full_weight_bytes

    def _pool_of(self, digests: Iterable[str]) -> int:
        return sum(self._bytes[digest] for digest in digests)

    def _pool_bytes(self, spec: AdapterSpec) -> int:
        return self._plan.full_weight_bytes_of(self._spec, spec.vocabulary)


def unregistered(digest: str) -> AdapterUnavailableError:
    return AdapterUnavailableError(
        f"No adapter with digest {digest} is registered here (any more). Name its model again.", param="model"
    )
