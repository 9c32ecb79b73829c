"""What the fleet serves and on which workers: the routing table and its version. Pure; the clock is given.

In memory only: rebuilt from the start-up configuration and the workers' reports whenever the controller starts.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from lorafleet.proto import controller_pb2, worker_pb2
from lorafleet.workers.actor import WorkerReady


class Catalogue:
    """Changes through its methods only; `version` grows with each change."""

    def __init__(self, *, names: Sequence[str], root: str, tokenizer_digest: str, created: int) -> None:
        """names: of the base model, canonical first. created: unix seconds."""
        self.incarnation = uuid.uuid4().hex
        self.version = 1
        self._names = tuple(names)
        self._root = root
        self._tokenizer_digest = tokenizer_digest
        self._created = created
        self._workers: dict[str, tuple[WorkerReady, worker_pb2.WorkerState]] = {}
        self._last: WorkerReady | None = None  # the base's sizes and the adapters stay known while no worker is up

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

    def table(self) -> controller_pb2.RoutingTable:
        """The table as gateways get it."""
        table = controller_pb2.RoutingTable(incarnation=self.incarnation, version=self.version)
        table.base.names.extend(self._names)
        table.base.root = self._root
        table.base.created = self._created
        table.base.tokenizer_digest = self._tokenizer_digest
        if self._last is not None:
            table.base.max_model_len = self._last.max_model_len
            table.base.vocab_size = self._last.vocab_size
            for adapter in self._last.adapters:
                table.adapters.add(
                    name=adapter.name,
                    digest=adapter.digest,
                    version=1,
                    root=adapter.root,
                    parent=adapter.base_model_name or self._names[0],
                    created=self._created,
                    lora_rank=adapter.lora_rank,
                )
        for worker, state in self._workers.values():
            table.workers.add(
                worker_id=worker.worker_id,
                generation=worker.generation,
                address=worker.address,
                state=state,
                max_num_seqs=worker.max_num_seqs,
                max_loras=worker.max_loras,
            )
        return table
