"""The fleet's models, adapters and workers: the routing table and its version. Pure; the clock is given.

It lies in memory only. A restarted controller rebuilds it from what workers and gateways know: for each name the newest
version counts. If all of them are lost together, only the adapters of the start-up's configuration remain.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from lorafleet.proto import controller_pb2, worker_pb2
from lorafleet.workers.errors import UnknownModelError, quoted
from lorafleet.workers.server.actor import WorkerReady
from lorafleet.workers.server.adapter_names import AdapterNames


@dataclass(frozen=True, slots=True)
class _Row:
    """A worker in the table."""

    worker: WorkerReady
    state: worker_pb2.WorkerState
    lacking: Callable[[], Sequence[controller_pb2.LackingAdapter]]  # returns the adapters it does not have now


class Catalogue:
    """Changed through its methods only; `version` grows with each change."""

    def __init__(
        self,
        *,
        names: Sequence[str],
        root: str,
        tokenizer_digest: str,
        created: int,
        now_ms: Callable[[], int],
        fleet: str = "",
        of_start: Collection[str] = (),
    ) -> None:
        """names: the base model's, canonical first. created: unix seconds. now_ms: unix milliseconds.

        fleet: an id, the same for all runs of its controller. of_start: adapters that workers load when they start.
        """
        self.incarnation = uuid.uuid4().hex
        self.fleet = fleet
        self.version = 1
        self.base_names = tuple(names)
        self.names = AdapterNames(of_start)  # changed here only
        self._root = root
        self._tokenizer_digest = tokenizer_digest
        self._created = created
        self._now_ms = now_ms
        self._highest = 0  # the highest adapter version ever seen
        self._rows: dict[str, _Row] = {}
        self._last: WorkerReady | None = None  # keeps the base model's sizes while no worker is up
        self._unheard: set[str] = set()
        self._table: controller_pb2.RoutingTable | None = None  # the last one made

    @property
    def is_complete(self) -> bool:
        """Return whether enough is known to publish: an incomplete table makes gateways drop sessions and adapters."""
        return self._last is not None and self.knows_names

    @property
    def knows_names(self) -> bool:
        """Return whether every worker that may know of adapters has been heard."""
        return not self._unheard

    def await_word(self, workers: Iterable[str]) -> None:
        """Wait, before publishing, for workers of the controller's earlier run: they may know of adapters."""
        self._unheard.update(workers)

    def heard(self, *workers: str) -> bool:
        """Note that workers have told what they know, or are lost. Return whether any of them was awaited."""
        awaited = not self._unheard.isdisjoint(workers)
        self._unheard.difference_update(workers)
        return awaited

    def put_worker(
        self,
        worker: WorkerReady,
        state: worker_pb2.WorkerState,
        lacking: Callable[[], Sequence[controller_pb2.LackingAdapter]] = tuple,
    ) -> bool:
        """Add a worker or note its state. Return whether that changed the table. lacking: called for each table."""
        known = self._rows.get(worker.worker_id)
        if known is not None and (known.worker, known.state) == (worker, state):
            return False
        self._rows[worker.worker_id] = _Row(worker, state, lacking)
        self._last = worker
        self.version += 1
        return True

    def drop_worker(self, worker_id: str) -> bool:
        """Forget a worker. Return whether it was in the table."""
        if self._rows.pop(worker_id, None) is None:
            return False
        self.version += 1
        return True

    def lacking_changed(self) -> None:
        """Note that the adapters some worker lacks have changed."""
        self.version += 1

    def note(self, adapters: Iterable[worker_pb2.Adapter]) -> bool:
        """Take over names from another part of the fleet where they are newer. Return whether any was."""
        told = [adapter for adapter in adapters if adapter.name not in self.base_names]
        self.see(adapter.version for adapter in told)
        if not self.names.note(told):
            return False
        self.version += 1
        return True

    def see(self, versions: Iterable[int]) -> None:
        """Note versions that exist somewhere, so that they are not assigned again."""
        self._highest = max(self._highest, *versions, 0)

    def adapters(self) -> list[worker_pb2.Adapter]:
        return self.names.loaded()

    def adapter(self, name: str) -> worker_pb2.Adapter | None:
        adapter = self.names.get(name)
        return None if adapter is None or adapter.unloaded else adapter

    def digests(self) -> set[str]:
        """Return the digests of all loaded adapters."""
        return {adapter.digest for adapter in self.names.loaded()}

    def next_version(self) -> int:
        """Return a version no adapter had. A clock set back is harmless while a part of the fleet knows the last."""
        self._highest = max(self._highest + 1, self._now_ms())
        return self._highest

    def put_adapter(self, adapter: worker_pb2.Adapter) -> None:
        """Let a name stand for this version from now on."""
        assert self.note([adapter]), "an old version"

    def drop_adapter(self, name: str) -> worker_pb2.Adapter:
        """Let a name stand for nothing. Return the adapter it stood for. Raises `UnknownModelError`."""
        adapter = self.adapter(name)
        if adapter is None:
            raise UnknownModelError(
                f"The LoRA adapter {quoted(name)} cannot be found. GET /v1/models lists those that are loaded.",
                param="lora_name",
            )
        self.put_adapter(worker_pb2.Adapter(name=name, version=self.next_version(), unloaded=True))
        return adapter

    def table(self) -> controller_pb2.RoutingTable:
        """Return the table as gateways get it; each version is made once."""
        if self._table is None or self._table.version != self.version:
            self._table = self._make_table()
        return self._table

    def _make_table(self) -> controller_pb2.RoutingTable:
        table = controller_pb2.RoutingTable(incarnation=self.incarnation, version=self.version, fleet=self.fleet)
        table.base.names.extend(self.base_names)
        table.base.root = self._root
        table.base.created = self._created
        table.base.tokenizer_digest = self._tokenizer_digest
        if self._last is not None:
            table.base.max_model_len = self._last.max_model_len
            table.base.vocab_size = self._last.vocab_size
        for adapter in self.names.all():
            if adapter.unloaded:
                table.unloaded.append(adapter)
                continue
            row = table.adapters.add()
            row.CopyFrom(adapter)
            row.parent = adapter.parent or self.base_names[0]
        for entry in self._rows.values():
            worker = entry.worker
            table.workers.add(
                worker_id=worker.worker_id,
                generation=worker.generation,
                address=worker.address,
                state=entry.state,
                max_num_seqs=worker.max_num_seqs,
                max_loras=worker.max_loras,
                num_ranks=worker.num_ranks,
                lacking=entry.lacking(),
            )
        return table
