"""What callers call an engine's adapters: names, ids. Several may stand for the same content.

Owns: which adapter an alias stands for, and that an adapter is unregistered with its last alias. Leaves to others: the
adapters themselves (engine/loop.py).
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Generic, TypeVar

from lorafleet.workers.adapters.background import background_threads
from lorafleet.workers.adapters.format import AdapterSpec
from lorafleet.workers.errors import UnknownModelError

if TYPE_CHECKING:
    from lorafleet.workers.engine.loop import Engine
    from lorafleet.workers.engine.registered import FreedBytes

_Alias = TypeVar("_Alias", bound=Hashable)


class Aliases(Generic[_Alias]):
    """Thread-safe. Changes are made one after the other, on a thread of its own: reading an adapter takes long."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._specs: dict[_Alias, AdapterSpec] = {}
        self._thread = background_threads(1, "lorafleet-register")

    def get(self, alias: _Alias) -> AdapterSpec | None:
        with self._lock:
            return self._specs.get(alias)

    def all(self) -> dict[_Alias, AdapterSpec]:
        with self._lock:
            return dict(self._specs)

    def add(self, alias: _Alias, path_or_id: str, roots: Sequence[str] | None = None) -> Future[AdapterSpec]:
        """Register what lies at `path_or_id` now and let `alias` stand for it, in place of what it stood for before.

        Fails with what `Engine.register_adapter` raises; the alias then stands for what it did.
        """
        return self._thread.submit(self._add, alias, path_or_id, roots)

    def remove(self, alias: _Alias) -> Future[Future[FreedBytes] | None]:
        """Take an alias away. Gives the future of what that frees once no request uses the adapter.

        Gives None where another alias stands for the same adapter. Fails with `UnknownModelError`.
        """
        return self._thread.submit(self._remove, alias)

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _add(self, alias: _Alias, path_or_id: str, roots: Sequence[str] | None) -> AdapterSpec:
        spec = self._engine.register_adapter(path_or_id, roots=roots)
        with self._lock:
            before = self._specs.get(alias)
            self._specs[alias] = spec
        if before is not None:
            self._unregister(before.digest)
        return spec

    def _remove(self, alias: _Alias) -> Future[FreedBytes] | None:
        with self._lock:
            spec = self._specs.pop(alias, None)
        if spec is None:
            raise UnknownModelError(f"No adapter {alias!r} is loaded here.", param="model")
        return self._unregister(spec.digest)

    def _unregister(self, digest: str) -> Future[FreedBytes] | None:
        with self._lock:
            if any(spec.digest == digest for spec in self._specs.values()):
                return None
        return self._engine.unregister_adapter(digest)
