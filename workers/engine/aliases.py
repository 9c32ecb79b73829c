"""Aliases of an engine's adapters: the callers' names or ids. Several may stand for the same content.

Owns: the adapter of each alias, unregistering an adapter with its last alias, and pins by alias. Leaves to others: the
adapters themselves (engine/loop.py), threads (adapters/named_work.py).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Generic, TypeVar

from lorafleet.workers.adapters.format import AdapterSpec
from lorafleet.workers.adapters.named_work import NamedWork
from lorafleet.workers.errors import AdapterRefusedError, LoRAFleetError, UnknownModelError
from lorafleet.workers.sources import hub

if TYPE_CHECKING:
    from lorafleet.workers.engine.loop import Engine
    from lorafleet.workers.engine.registered import FreedBytes

logger = logging.getLogger(__name__)

_DOWNLOAD_S = 590.0  # limit for finding, reading and verifying one that may need a download
_READ_TIMEOUTS = 10  # limit for others, in --adapter-read-timeout-s: look-up, full read, hash

_Alias = TypeVar("_Alias", bound=Hashable)
_Read = TypeVar("_Read")
_Result = TypeVar("_Result")


class Aliases(Generic[_Alias]):
    """Thread-safe. Calls for one alias run in order; different aliases never wait for each other."""

    def __init__(self, engine: Engine, owner: Callable[[_Alias], Hashable] = lambda alias: alias) -> None:
        """owner: of an alias. Of an owner's pinned aliases only the last one's adapter is pinned, until that is
        removed."""
        self._engine = engine
        self._owner = owner
        self._work: NamedWork[_Alias] = NamedWork()
        self._lock = threading.Lock()  # also held during calls of the engine, so that both agree
        self._specs: dict[_Alias, AdapterSpec] = {}
        self._pinned: dict[_Alias, None] = {}  # to be pinned, in order
        self._pins: set[str] = set()  # digests

    def get(self, alias: _Alias) -> AdapterSpec | None:
        with self._lock:
            return self._specs.get(alias)

    def all(self) -> dict[_Alias, AdapterSpec]:
        with self._lock:
            return dict(self._specs)

    def add(self, alias: _Alias, path_or_id: str, roots: Sequence[str] | None = None) -> Future[AdapterSpec]:
        """Register the adapter now at `path_or_id` and let `alias` stand for it, replacing its earlier adapter.

        Fails with what `Engine.register_adapter` raises; the alias then keeps its earlier adapter.
        """

        def change(spec: AdapterSpec) -> AdapterSpec:
            self.put(alias, spec)
            return spec

        return self.in_turn(alias, lambda: self._engine.read_adapter(path_or_id, roots=roots), change, path_or_id)

    def in_turn(
        self, alias: _Alias, read: Callable[[], _Read], change: Callable[[_Read], _Result], path_or_id: str
    ) -> Future[_Result]:
        """Run `read`, which reads the files at `path_or_id` for an alias, then `change`. See `NamedWork`."""

        def named() -> _Read:
            try:
                return read()
            except LoRAFleetError:
                raise
            except Exception as error:
                logger.exception("reading an adapter failed")
                raise AdapterRefusedError(
                    f"The adapter's files cannot be read: {type(error).__name__}: {str(error)[:200]}",
                    reason="unreadable",
                ) from error

        may_download = hub.is_hub_id(path_or_id)
        limit_s = _DOWNLOAD_S if may_download else _READ_TIMEOUTS * self._engine.config.adapter_read_timeout_s
        return self._work.submit(alias, named, change, limit_s=limit_s)

    def put(self, alias: _Alias, spec: AdapterSpec, *, pin: bool = False) -> None:
        """Let an alias stand for a result of `Engine.read_adapter`, replacing its earlier adapter.

        pin: keep it in a slot until the alias is removed; a pinned alias stays pinned. Raises `AdapterRefusedError`,
        `AdapterConflictError`; the alias then keeps its earlier adapter.
        """
        with self._lock:
            before = self._specs.get(alias)
            pinned = self._pinned
            self._engine.add_adapter(spec)
            self._specs[alias] = spec
            try:
                if pin and alias not in pinned:
                    self._pinned = pinned | {alias: None}
                self._repin()
            except LoRAFleetError:
                self._pinned = pinned
                if before is None:
                    del self._specs[alias]
                else:
                    self._specs[alias] = before
                self._unregister(spec.digest)
                raise
            if before is not None:
                self._unregister(before.digest)

    def pin(self, alias: _Alias) -> bool:
        """Keep an alias's adapter in a slot until the alias is removed. Return False for an unknown alias.

        Raises `AdapterConflictError`.
        """
        with self._lock:
            if alias not in self._specs:
                return False
            pinned = self._pinned
            self._pinned = pinned | {alias: None}
            try:
                self._repin()
            except LoRAFleetError:
                self._pinned = pinned
                raise
            return True

    def remove(self, alias: _Alias) -> Future[Future[FreedBytes] | None]:
        """Remove an alias. The result is the future of the bytes freed once no request uses the adapter.

        It is None if another alias stands for the same adapter. Fails with `UnknownModelError`.
        """
        return self.in_turn(alias, lambda: None, lambda _: self.drop(alias), "")

    def close(self) -> None:
        self._work.close()

    def drop(self, alias: _Alias) -> Future[FreedBytes] | None:
        """Do what `remove` does, now. Raises `UnknownModelError`."""
        with self._lock:
            spec = self._specs.pop(alias, None)
            if spec is None:
                raise UnknownModelError(f"No adapter {alias!r} is loaded here.", param="model")
            self._pinned.pop(alias, None)
            try:
                self._repin()
            except LoRAFleetError as error:
                logger.warning("an adapter of %r cannot be pinned again: %s", self._owner(alias), error.message)
                self._pinned = {other: None for other in self._pinned if self._specs[other].digest in self._pins}
                self._repin()
            return self._unregister(spec.digest)

    def _repin(self) -> None:
        """Update the engine's pins to those wanted now. The lock is held."""
        last = {self._owner(alias): self._specs[alias].digest for alias in self._pinned}
        pins = set(last.values())
        if pins != self._pins:
            self._engine.repin_adapters(pins - self._pins, self._pins - pins)
            self._pins = pins

    def _unregister(self, digest: str) -> Future[FreedBytes] | None:
        """Unregister an adapter unless an alias still stands for it. The lock is held."""
        if any(spec.digest == digest for spec in self._specs.values()):
            return None
        return self._engine.unregister_adapter(digest)
