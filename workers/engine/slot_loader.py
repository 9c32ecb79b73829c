"""How adapters get from the disk into host memory, and from there into their slots, without a step waiting for one.

When the host tier has one, a loader thread lists what is to be copied where, and has the other ranks do all of it; the
stepping thread copies in pieces between steps. What an earlier load has left ready needs no loader thread.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import torch

from lorafleet.workers.adapters.background import BackgroundThreads
from lorafleet.workers.adapters.format import HostAdapter
from lorafleet.workers.adapters.store import AdapterStore
from lorafleet.workers.engine.adapter_slots import AdapterSlots
from lorafleet.workers.engine.batch import SlotLoad
from lorafleet.workers.engine.pace import PaceMeter
from lorafleet.workers.errors import InternalError, LoRAFleetError
from lorafleet.workers.model.runner import ModelRunner
from lorafleet.workers.model.slot_write import SlotWrite
from lorafleet.workers.tp.followers import Followers

logger = logging.getLogger(__name__)

_NUM_LOADERS = 4
# A step may be put off, by adapters that are copied to their slots, by this share of the one before it.
_COPY_SHARE = 0.05
_MIN_COPY_S = 50e-6
_COPY_BYTES = 128 << 10  # in one piece: ten microseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A loader thread's report: an adapter that only has to be copied into its slot, or why that cannot be."""

    load: SlotLoad
    number: int  # each has its own
    write: SlotWrite | LoRAFleetError
    seconds: float
    began: float  # time.monotonic()
    from_disk: bool


@dataclass(frozen=True, slots=True)
class Fetched:
    """What came of a `fetch`: the adapter is in host memory, or why not."""

    digest: str
    seconds: float
    from_disk: bool
    error: BaseException | None


class SlotLoader:
    """`report`, called on some thread, brings what came of a load or a fetch to the stepping thread, which calls all
    methods.
    """

    def __init__(
        self,
        *,
        store: AdapterStore,
        slots: AdapterSlots,
        runner: ModelRunner,
        followers: Followers,
        pace: PaceMeter,
        report: Callable[[Loaded | Fetched], None],
    ) -> None:
        self._pace = pace
        self._followers = followers
        self._numbers = count()
        self._store = store
        self._slots = slots
        self._runner = runner
        self._report = report
        self._loaders = BackgroundThreads(_NUM_LOADERS, "lorafleet-slot")
        self._copying: deque[tuple[Loaded, SlotWrite]] = deque()
        self._copy_s = _MIN_COPY_S  # for copying, before the next step
        self._fetching: Counter[str] = Counter()
        self.num_loading = 0
        self.num_loaded = 0  # ever

    @property
    def num_coming(self) -> int:
        """Loads and fetches that have not ended."""
        return self.num_loading + len(self._fetching)

    def is_fetching(self, digest: str) -> bool:
        return digest in self._fetching

    @property
    def is_copying(self) -> bool:
        return bool(self._copying)

    def fetch(self, digest: str) -> None:
        """Bring an adapter into host memory, where nothing holds it; it is to have a slot soon."""
        self._fetching[digest] += 1
        if not self._followers.are_none:  # they read it while this rank does
            self._loaders.submit(partial(self._followers.prefetch, digest))
        began = time.monotonic()
        fetched = self._store.fetch(digest)
        from_disk = not fetched.done()

        def report(fetched: Future[HostAdapter]) -> None:
            error = fetched.exception()
            if error is None:
                self._store.release(digest)
            self._report(Fetched(digest, time.monotonic() - began, from_disk, error))

        fetched.add_done_callback(report)

    def take_fetched(self, fetched: Fetched) -> LoRAFleetError | None:
        """Take in what came of a `fetch`; why it failed."""
        self._fetching -= Counter([fetched.digest])
        if fetched.error is None:
            if fetched.from_disk:
                self._pace.book_load(fetched.seconds, from_disk=True)
            return None
        if isinstance(fetched.error, LoRAFleetError):
            return fetched.error
        return InternalError("Reading the adapter failed; the worker's log says why.")

    def start(self, load: SlotLoad) -> None:
        """Begin to bring an adapter into the slot that `AdapterSlots` gave it."""
        self.num_loading += 1
        number = next(self._numbers)
        write = self._at_hand(load)
        began = time.monotonic()
        if write is not None:
            self._copying.append(
                (Loaded(load=load, number=number, write=write, seconds=0.0, began=began, from_disk=False), write)
            )
            return
        if not self._followers.are_none:  # they read it while this rank does
            self._loaders.submit(partial(self._followers.prefetch, load.digest))
        # No loader thread waits for a read: many may hang.
        fetched = self._store.fetch(load.digest)
        from_disk = not fetched.done()
        fetched.add_done_callback(
            lambda fetched: self._loaders.submit(partial(self._load, load, number, fetched, began, from_disk))
        )

    def pin(self, digest: str, stays: bool) -> None:
        """Let an adapter stay in its slot or not; if it is to and is in none, bring it into one that can be had now."""
        self._slots.stay(digest, stays)
        if stays and self._slots.slot_of(digest) is None and not self._slots.is_loading(digest):
            slot = self._slots.start_load(digest)
            if slot is not None:  # else it comes with its first request
                self.clear_emptied()
                self.start(SlotLoad(digest, slot))

    def take(self, loaded: Loaded) -> LoRAFleetError | None:
        """Take in what a loader thread reported: `copy` goes on with it, or its slot is free again and this is why."""
        if isinstance(loaded.write, SlotWrite):
            self._copying.append((loaded, loaded.write))
            return None
        self.num_loading -= 1
        self._slots.fail_load(loaded.load.digest)
        return loaded.write

    def copy(self, *, puts_off: bool) -> None:
        """Copy adapters into their slots: all of them, or, where that puts off a step, for as long as it may."""
        began = time.monotonic()
        while self._copying:
            loaded, write = self._copying[0]
            if write.advance(_COPY_BYTES):
                self._copying.popleft()
                self._runner.commit(write, loaded.number)
                self._store.release(loaded.load.digest)
                self._slots.finish_load(loaded.load.digest, loaded.seconds)
                self._pace.book_load(time.monotonic() - loaded.began, from_disk=loaded.from_disk)
                self.num_loading -= 1
                self.num_loaded += 1
            if puts_off and time.monotonic() - began >= self._copy_s:
                return

    def book_step(self, seconds: float) -> None:
        """How long a step took: the next one may be put off by a share of it."""
        self._copy_s = max(_MIN_COPY_S, _COPY_SHARE * seconds)

    def clear_emptied(self) -> None:
        """Free the memory that evicted and dropped adapters had beside their slots."""
        for slot in self._slots.take_emptied():
            self._runner.clear_slot(slot)

    def close(self) -> None:
        """The store is closed already, so that no load begins any more."""
        self._loaders.close()

    def _at_hand(self, load: SlotLoad) -> SlotWrite | None:
        """An adapter of which nothing is left to do but the copying: asking another thread would take longer."""
        if not self._followers.are_none:
            return None
        adapter = self._store.fetch_resident(load.digest)
        if adapter is None:
            return None
        if not self._runner.is_prepared(adapter):
            self._store.release(load.digest)
            return None
        return self._runner.prepare_adapter(load.slot, adapter)

    def _load(self, load: SlotLoad, number: int, fetched: Future[HostAdapter], began: float, from_disk: bool) -> None:
        """On a loader thread: bring an adapter as near to its slot as can be without the stepping thread, and report.

        When it reports one, all other ranks have it in their slots.
        """
        write: SlotWrite | LoRAFleetError
        try:
            write = self._prepare(load, number, fetched.result())  # held until it is copied
        except LoRAFleetError as refused:
            write = refused
        except Exception:
            logger.exception("loading adapter %s into slot %d failed", load.digest, load.slot)
            write = InternalError("Loading the adapter failed; the worker's log says why.")
        self._report(
            Loaded(
                load=load,
                number=number,
                write=write,
                seconds=time.monotonic() - began,
                began=began,
                from_disk=from_disk,
            )
        )

    def _prepare(self, load: SlotLoad, number: int, adapter: HostAdapter) -> SlotWrite:
        """When it has returned or raised, no other rank writes into the slot any more."""
        try:
            spec = self._store.spec(load.digest)
            assert spec is not None, "it is not forgotten while it is on its way"
            norms_NH = self._split_norms(adapter, spec.path)
            wait_for_others = self._followers.stage(spec.path, load.digest, load.slot, number, norms_NH)
            try:
                return self._runner.prepare_adapter(load.slot, adapter)
            finally:
                wait_for_others()
        except BaseException:
            self._store.release(load.digest)
            raise

    def _split_norms(self, adapter: HostAdapter, path: Path) -> torch.Tensor | None:
        """DoRA's norms that are sums over the ranks, [N, H], made if need be; None: there are none."""
        runner = self._runner
        if not runner.has_split_norms(adapter):
            return None
        if runner.split_norms(adapter) is None:
            others = self._followers.partial_squares(path, adapter.digest)
            runner.set_split_norms(adapter, sum(others, runner.partial_squares(adapter)).sqrt_())
        return runner.split_norms(adapter)
