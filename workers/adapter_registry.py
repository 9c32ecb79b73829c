"""The adapters of one worker by (name, version), as the controller asked for them.

Owns: what is known of each. Leaves to others: what an alias stands for (adapters/aliases.py), gRPC (service.py).
"""

from __future__ import annotations

import threading
from concurrent.futures import Future

from lorafleet.proto import worker_pb2
from lorafleet.workers.adapters.aliases import Aliases
from lorafleet.workers.engine.loop import Engine, FreedBytes

_Key = tuple[str, int]


class AdapterRegistry:
    """Thread-safe. Calls block while files are read."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._aliases: Aliases[_Key] = Aliases(engine)
        self._lock = threading.Lock()
        self._adapters: dict[_Key, worker_pb2.Adapter] = {}

    def all(self) -> list[worker_pb2.Adapter]:
        with self._lock:
            return list(self._adapters.values())

    def register(self, request: worker_pb2.RegisterAdapterRequest) -> worker_pb2.Adapter:
        """Read and verify an adapter; one that is known under this name and version is not read again.

        Raises `AdapterRefusedError`.
        """
        key = request.name, request.version
        with self._lock:
            known = self._adapters.get(key)
        if known is not None:
            return known
        spec = self._aliases.add(key, request.root, list(request.allowed_roots) or None).result()
        adapter = worker_pb2.Adapter(
            name=request.name,
            digest=spec.digest,
            version=request.version,
            root=request.root,
            parent=request.parent,
            created=request.created,
            lora_rank=spec.lora_rank,
        )
        with self._lock:
            self._adapters[key] = adapter
        return adapter

    def prefetch(self, adapter: worker_pb2.Adapter) -> None:
        """Bring it into the host cache, if there is room, before the first request names it."""
        self._engine.prefetch_adapter(adapter.digest)

    def unregister(self, name: str, version: int) -> Future[FreedBytes] | None:
        """Forget it; what that frees, see `Aliases.remove`. Raises `UnknownModelError`."""
        with self._lock:
            self._adapters.pop((name, version), None)
        return self._aliases.remove((name, version)).result()
