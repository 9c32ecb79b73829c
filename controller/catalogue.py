"""What the fleet serves and on which workers: the routing table and its version. Pure; the clock is given.

In memory only: rebuilt from the first worker's adapters whenever the controller starts.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence

from lorafleet.proto import controller_pb2, worker_pb2
from lorafleet.workers.actor import WorkerReady
from lorafleet.workers.errors import UnknownModelError


class Catalogue:
    """Changes through its methods only; `version` grows with each change."""

    def __init__(self, *, names: Sequence[str], root: str, tokenizer_digest: str, created: int) -> None:
        """names: of the base model, canonical first. created: unix seconds."""
        self.incarnation = uuid.uuid4().hex
        self.version = 1
        self.base_names = tuple(names)
        self._root = root
        self._tokenizer_digest = tokenizer_digest
        self._created = created
        self._adapters: dict[str, worker_pb2.Adapter] | None = None  # None: no worker has said yet
        self._last_versions: dict[str, int] = {}  # a version is never used again, not even after an unload
        self._workers: dict[str, tuple[WorkerReady, worker_pb2.WorkerState]] = {}
        self._last: WorkerReady | None = None  # the base's sizes stay known while no worker is up

    @property
    def is_complete(self) -> bool:
        """Whether a worker has said what it serves. A table from before would make gateways drop their sessions."""
        return self._last is not None

    def put_worker(self, worker: WorkerReady, state: worker_pb2.WorkerState) -> bool:
        """Add a worker or note its state; whether that changed the table."""
        if self._workers.get(worker.worker_id) == (worker, state):
            return False
        self._workers[worker.worker_id] = (worker, state)
        self._last = worker
        self.version += 1
        return True

    def drop_worker(self, worker_id: str) -> bool:
        """Forget a worker; whether it was there."""
        if self._workers.pop(worker_id, None) is None:
            return False
        self.version += 1
        return True

    def adopt(self, adapters: Iterable[worker_pb2.Adapter]) -> None:
        """Take the adapters of the first worker that is met as the fleet's, of each name the newest version."""
        if self._adapters is None:
            self._adapters = {}
            for adapter in sorted(adapters, key=lambda adapter: adapter.version):
                self.put_adapter(adapter)

    def adapters(self) -> list[worker_pb2.Adapter]:
        return list((self._adapters or {}).values())

    def adapter(self, name: str) -> worker_pb2.Adapter | None:
        return (self._adapters or {}).get(name)

    def next_version(self, name: str) -> int:
        return self._last_versions.get(name, 0) + 1

    def put_adapter(self, adapter: worker_pb2.Adapter) -> None:
        """Let a name stand for this version from now on."""
        assert self._adapters is not None
        assert adapter.version >= self.next_version(adapter.name)
        self._adapters[adapter.name] = adapter
        self._last_versions[adapter.name] = adapter.version
        self.version += 1

    def drop_adapter(self, name: str) -> worker_pb2.Adapter:
        """Forget a name; what it stood for. Raises `UnknownModelError`."""
        adapter = (self._adapters or {}).pop(name, None)
        if adapter is None:
            raise UnknownModelError(
                f"The LoRA adapter {name!r} cannot be found. GET /v1/models lists those that are loaded.",
                param="lora_name",
            )
        self.version += 1
        return adapter

    def table(self) -> controller_pb2.RoutingTable:
        """The table as gateways get it."""
        table = controller_pb2.RoutingTable(incarnation=self.incarnation, version=self.version)
        table.base.names.extend(self.base_names)
        table.base.root = self._root
        table.base.created = self._created
        table.base.tokenizer_digest = self._tokenizer_digest
        if self._last is not None:
            table.base.max_model_len = self._last.max_model_len
            table.base.vocab_size = self._last.vocab_size
        for adapter in self.adapters():
            row = table.adapters.add()
            row.CopyFrom(adapter)
            row.parent = adapter.parent or self.base_names[0]
        for worker, state in self._workers.values():
            table.workers.add(
                worker_id=worker.worker_id,
                generation=worker.generation,
                address=worker.address,
                state=state,
                max_num_seqs=worker.max_num_seqs,
                max_loras=worker.max_loras,
                num_ranks=worker.num_ranks,
            )
        return table
