"""The adapters requests may use, and the retirement of those that were removed.

An adapter is registered, perhaps pinned, then retired, and freed when its last request has ended. Pinned ones keep
their slot and their share of the pool for embeddings and heads. A request that could never run beside them is refused;
so is a pin that would leave an accepted request no room. Leaves to others: loading into a slot (slot_loader.py), the
tier of an adapter (scheduling/adapter_slots.py, adapters/store.py).
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
from lorafleet.workers.adapters.format import AdapterSpec, read_adapter_spec
from lorafleet.workers.adapters.store import AdapterStore
from lorafleet.workers.config import EngineConfig
from lorafleet.workers.errors import (
    AdapterConflictError,
    AdapterRefusedError,
    AdapterUnavailableError,
    LoRAFleetError,
    UnknownModelError,
    quoted,
)
from lorafleet.workers.model.architecture import ModelSpec
from lorafleet.workers.model.loader import CheckpointReader
from lorafleet.workers.model.memory_plan import MemoryPlan
from lorafleet.workers.ranks.followers import Followers
from lorafleet.workers.scheduling.adapter_slots import AdapterSlots
from lorafleet.workers.sources.adapters import resolve_adapter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FreedBytes:
    """Memory freed by unregistering an adapter. device: its slot, and its share of the pool for own tables."""

    device: int
    host: int


@dataclass(frozen=True, slots=True)
class Retire:
    """An adapter that was unregistered, to be freed when its last request has ended."""

    digest: str
    freed: Future[FreedBytes]


class RegisteredAdapters:
    """The registered adapters, by digest. The caller holds the engine's lock unless a method says otherwise."""

    MAX_FREED = 32  # per step

    def __init__(
        self,
        config: EngineConfig,
        *,
        spec: ModelSpec,
        memory: MemoryPlan,
        store: AdapterStore,
        slots: AdapterSlots,
        followers: Followers,
    ) -> None:
        self._followers = followers
        self._config = config
        self._spec = spec
        self._memory = memory
        self._store = store
        self._slots = slots
        self._registered: set[str] = set()
        self._bytes: dict[str, int] = {}  # in the pool, of these and of retired ones
        self._pinned: set[str] = set()  # registered ones that stay in their slots
        self._users: Counter[str] = Counter()  # unfinished requests using each
        self._retiring: dict[str, list[Retire]] = {}
        self._unused: dict[str, None] = {}  # retiring ones without requests; an ordered set

    def read(self, path_or_id: str, roots: Sequence[str] | None) -> AdapterSpec:
        """Find, read and verify an adapter to be added. Call it without the lock: it is slow.

        roots: where it must be, see `resolve_adapter`. Raises `AdapterRefusedError`.
        """
        lora = self._config.lora
        if lora is None:
            raise AdapterRefusedError(
                f"LoRA is off, so adapter {quoted(path_or_id)} cannot be used. Start with --enable-lora "
                "(enable_lora=True).",
                reason="lora_disabled",
            )
        folder = resolve_adapter(path_or_id, roots)
        spec = read_adapter_spec(
            folder,
            self._spec.base_shapes,
            max_lora_rank=lora.max_lora_rank,
            max_extra_vocab=lora.lora_extra_vocab_size,
            base_rows=lambda name, rows: CheckpointReader(Path(self._config.model)).rows(name, rows),
        )
        if not is_same_base(self._config.model, spec.config.base_model_name):
            logger.warning(
                "adapter %s was trained for %r according to its config; its shapes fit %r, so it is served on that",
                folder,
                spec.config.base_model_name,
                self._config.model,
            )
        num_bytes = self._pool_bytes(spec)
        if num_bytes > self._memory.full_weight_bytes:
            raise AdapterRefusedError(
                f"{folder} has {num_bytes} bytes of embedding, head or LoRA on them; the pool for these weights holds "
                f"{self._memory.full_weight_bytes}. Raise --lora-full-weight-bytes.",
                reason="larger_than_full_weight_pool",
            )
        self._followers.register(spec.path, spec.digest)
        return spec

    def add(self, spec: AdapterSpec) -> None:
        """Register an adapter. Idempotent. Raises `AdapterRefusedError` if it does not fit into the host tier."""
        self._store.register(spec)
        self._registered.add(spec.digest)
        self._bytes[spec.digest] = self._pool_bytes(spec)

    def remove(self, digest: str) -> Retire:
        """Unregister an adapter: no new request may use it. Raises `UnknownModelError` if it is not registered."""
        if digest not in self._registered:
            raise UnknownModelError(f"No adapter with digest {digest} is registered here.", param="model")
        self._registered.remove(digest)
        self._pinned.discard(digest)
        freed: Future[FreedBytes] = Future()
        freed.set_running_or_notify_cancel()  # a waiter cannot cancel it
        return Retire(digest, freed)

    def repin(
        self, pin: Collection[str], unpin: Collection[str], unfinished: Iterable[Sequence[str]]
    ) -> list[tuple[str, bool]]:
        """Pin some adapters to their slots and unpin others. unfinished: the digests of each unfinished request.

        Returns the changes: (digest, whether it is pinned). Raises `AdapterConflictError`, without any change, if too
        little room would be left for other adapters.
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
        """Check that a request may use these adapters besides the pinned ones.

        Raises `AdapterUnavailableError` or `AdapterConflictError`.
        """
        for digest in digests:
            if digest not in self._registered:
                raise unregistered(digest)
        pinned = self._pinned if pinned is None else pinned
        if not self._have_slots(digests, pinned):
            raise AdapterConflictError(
                f"This request needs {len(digests)} adapter slots, but pinned adapters hold "
                f"{len(pinned)} of {self._memory.max_loras}. Unload a pinned adapter or raise --max-loras."
            )
        if not self._have_pool(digests, pinned):
            raise AdapterConflictError(
                f"This request's adapters need {self._pool_of(digests)} bytes of the pool for embeddings and heads, "
                f"but pinned adapters hold {self._pool_of(pinned)} of {self._memory.full_weight_bytes}. Unload a "
                "pinned adapter or raise --lora-full-weight-bytes."
            )

    def use(self, digests: Sequence[str]) -> None:
        """Count an accepted request that uses these adapters; none: it is the base model's."""
        self._users.update(digests or [""])

    def leave(self, digests: Sequence[str]) -> None:
        """Count the end of a request that used these adapters."""
        for digest in digests or [""]:
            self._users[digest] -= 1
            if not self._users[digest]:
                del self._users[digest]
                if digest in self._retiring:
                    self._unused[digest] = None

    def num_requests(self) -> dict[str, int]:
        """Return the number of unfinished requests of each, and of the base model under ""."""
        return dict(self._users)

    def all(self) -> tuple[str, ...]:
        """Return the digests."""
        return tuple(self._registered)

    def spec(self, digest: str) -> AdapterSpec:
        """Return an adapter's spec. Needs no lock. Raises `AdapterUnavailableError` for an unknown digest."""
        spec = self._store.spec(digest)
        if spec is None:
            raise unregistered(digest)
        return spec

    def retire(self, retire: Retire) -> None:
        """Begin to retire an adapter, on the stepping thread, with or without the lock; all earlier calls are done."""
        self._slots.pin(retire.digest, False)
        self._retiring.setdefault(retire.digest, []).append(retire)
        if retire.digest not in self._users:
            self._unused[retire.digest] = None

    def can_free(self, is_coming: Callable[[str], bool]) -> bool:
        """Return whether `free_unused` would free something."""
        return not all(map(is_coming, self._unused))

    def free_unused(self, is_coming: Callable[[str], bool]) -> list[tuple[Retire, FreedBytes]]:
        """Free the slots and the host memory of retired adapters without requests. Runs on the stepping thread.

        One that was registered again keeps both. Frees a limited number per call, so that the step stays short.
        is_coming: an adapter being loaded into a slot is freed after that load.
        """
        freed = []
        for digest in list(islice(filterfalse(is_coming, self._unused), self.MAX_FREED)):
            if digest in self._users:  # registered and used again
                del self._unused[digest]
            else:
                del self._unused[digest]
                retires = self._retiring.pop(digest)
                num_bytes = FreedBytes(0, 0) if digest in self._registered else self._free(digest)
                freed += [(retire, FreedBytes(0, 0)) for retire in retires[:-1]]
                freed.append((retires[-1], num_bytes))
        return freed

    def close(self, unseen: Iterable[Retire], error: LoRAFleetError) -> None:
        """Fail the futures of all pending retirements. unseen: those that `retire` has not got yet."""
        waiting = [retire for retires in self._retiring.values() for retire in retires]
        self._retiring.clear()
        self._unused.clear()
        for retire in [*waiting, *unseen]:
            retire.freed.set_exception(error)

    def check_integrity(self, unseen: Iterable[Retire]) -> None:
        """Check that every resident adapter is registered or retiring. For tests."""
        retiring = {*self._retiring, *(retire.digest for retire in unseen)}
        assert set(self._slots.resident()) <= self._registered | retiring
        assert self._unused.keys() <= self._retiring.keys()
        assert self._bytes.keys() == self._registered | retiring
        assert self._pinned <= self._registered
        assert self._pool_of(self._pinned) <= self._memory.full_weight_bytes

    def _free(self, digest: str) -> FreedBytes:
        pool_bytes = self._slots.drop(digest)
        device = 0 if pool_bytes is None else self._memory.slot_bytes + pool_bytes
        self._followers.forget(digest)
        del self._bytes[digest]
        return FreedBytes(device, self._store.forget(digest))

    def _check_pins(self, pinned: set[str], unfinished: Iterable[Sequence[str]]) -> None:
        limit = self._memory.max_loras - 1
        if len(pinned) > limit:
            raise AdapterConflictError(
                f"{len(self._pinned)} of {self._memory.max_loras} slots hold pinned adapters; the limit is {limit}. "
                "Raise --max-loras or unload a pinned adapter."
            )
        if self._pool_of(pinned) > self._memory.full_weight_bytes:
            raise AdapterConflictError(
                f"Embeddings and heads of pinned adapters would take {self._pool_of(pinned)} bytes; their pool "
                f"has {self._memory.full_weight_bytes}. Raise --lora-full-weight-bytes or unload a pinned adapter."
            )
        for digests in unfinished:
            if not self._have_slots(digests, pinned):
                raise AdapterConflictError(
                    "Another pinned adapter would leave an unfinished request too few adapter slots. Pin it later or "
                    "raise --max-loras."
                )
            if not self._have_pool(digests, pinned):
                raise AdapterConflictError(
                    "Another pinned adapter would leave an unfinished request's embedding or head too little memory. "
                    "Pin it later or raise --lora-full-weight-bytes."
                )

    def _have_slots(self, digests: Sequence[str], pinned: set[str]) -> bool:
        """Return whether these adapters fit into the slots together with the pinned ones."""
        return len(pinned.union(digests)) <= self._memory.max_loras

    def _have_pool(self, digests: Sequence[str], pinned: set[str]) -> bool:
        """Return whether their embeddings and heads fit into the pool together with the pinned ones'."""
        return not self._pool_of(digests) or self._pool_of(pinned.union(digests)) <= self._memory.full_weight_bytes

    def _pool_of(self, digests: Iterable[str]) -> int:
        return sum(self._bytes[digest] for digest in digests)

    def _pool_bytes(self, spec: AdapterSpec) -> int:
        return self._memory.full_weight_bytes_of(self._spec, spec.vocabulary)


def unregistered(digest: str) -> AdapterUnavailableError:
    return AdapterUnavailableError(
        f"No adapter with digest {digest} is registered here. Send the request again by model name.", param="model"
    )
