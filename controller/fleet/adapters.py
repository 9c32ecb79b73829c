"""Loads and unloads adapters at run time: on every worker, then in the table, or not at all.

Owns: the order of the phases. For a load, all workers read the adapter, then note that the name stands for it, then
the table is published; for an unload, they note it, then the table is published. So an acknowledged change is known to
a worker, from which a restarted controller learns it, and a failed one is known to none. Leaves to others: the adapter
each name stands for (catalogue.py), workers that missed a change (worker_adapters.py), old versions (retirement.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

import grpc.aio

from lorafleet.controller.fleet.catalogue import Catalogue
from lorafleet.controller.fleet.reconcile import Key
from lorafleet.controller.fleet.retirement import Freed, Retirement
from lorafleet.controller.fleet.update_turns import UpdateTurns
from lorafleet.proto import worker_pb2
from lorafleet.workers.errors import (
    AdapterConflictError,
    AdapterRefusedError,
    InvalidRequestError,
    LoRAFleetError,
    NotFoundError,
    WorkerUnavailableError,
    quoted,
)
from lorafleet.workers.scheduling.request import ADAPTER_NAME, MAX_WEIGHT, MIN_WEIGHT, is_adapter_name

_T = TypeVar("_T")

MAX_ROOT_CHARS = 4096  # the longest path on Linux
FORGET_S = 5.0  # to remove what a failed load has left on a worker; after that reconciling finds it
KNOW_S = 12.0  # how long an update waits for a controller that has just started to know all names
_LOOK_S = 0.5  # between checks whether a worker that reads an adapter is still there


class Worker(Protocol):
    """The part of worker_adapters.py's `WorkerAdapters` used here."""

    async def register(self, adapter: worker_pb2.Adapter) -> worker_pb2.Adapter: ...
    async def note(self, adapters: Sequence[worker_pb2.Adapter]) -> None: ...
    async def unregister(self, key: Key, timeout_s: float) -> worker_pb2.UnregisterAdapterReply | None: ...
    def catch_up(self, newest: worker_pb2.Adapter) -> None: ...


class AdapterUpdates:
    """Runs one update at a time for each name; different names do not wait for each other."""

    def __init__(
        self,
        catalogue: Catalogue,
        retirement: Retirement,
        workers: Callable[[], Collection[Worker]],
        changed: Callable[[], None],
        *,
        allowed: bool,
        roots: Sequence[str],
        tell: Callable[[str, int], None],
    ) -> None:
        """workers: those in the table. changed: called after each change of the catalogue. tell: called with an event's
        line and log level."""
        self.staging: set[Key] = set()  # versions the workers are reading; no name stands for them yet
        self._tell = tell
        self._catalogue = catalogue
        self._retirement = retirement
        self._workers = workers
        self._changed = changed
        self._allowed = allowed
        self._roots = roots
        self._turns = UpdateTurns()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def load(
        self, name: str, root: str, *, load_inplace: bool, weight: float = 1.0, pin: bool = False
    ) -> worker_pb2.Adapter:
        """Read and verify the adapter at `root` on every worker, then let `name` stand for it.

        weight, pin: see Adapter in worker.proto. Raises `AdapterConflictError` for a name in use (unless load_inplace),
        `AdapterRefusedError`, `QueueFullError`, `WorkerUnavailableError`; the name then keeps its old adapter.
        """
        self._check_allowed()
        _check_name(name, root)
        if not MIN_WEIGHT <= weight <= MAX_WEIGHT:  # false for NaN too
            raise InvalidRequestError(
                f"weight is {weight}; it must be between {MIN_WEIGHT:g} and {MAX_WEIGHT:g}.", param="weight"
            )
        if name in self._catalogue.base_names:
            raise AdapterConflictError(
                f"{quoted(name)} is a name of the base model. Choose another.", param="lora_name"
            )
        # Shielded, so that a caller who disconnects leaves nothing half done.
        return await asyncio.shield(self._keep(self._load(name, root, load_inplace, weight, pin)))

    async def unload(self, name: str) -> Freed:
        """Remove a name from the table, let its requests finish, and free its memory.

        Raises `UnknownModelError`, `AdapterConflictError`, `QueueFullError`, `WorkerUnavailableError`.
        """
        self._check_allowed()
        return await asyncio.shield(self._keep(self._unload(name)))

    async def close(self) -> None:
        """Cancel all updates in progress."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _load(self, name: str, root: str, load_inplace: bool, weight: float, pin: bool) -> worker_pb2.Adapter:
        async with self._turns.of(name, takes_place=True):
            await self._know_names()
            current = self._catalogue.adapter(name)
            if current is not None and not load_inplace:
                raise AdapterConflictError(
                    f"The LoRA adapter {quoted(name)} has already been loaded. Set 'load_inplace' to true to replace "
                    "it, or unload it first.",
                    param="lora_name",
                )
            wanted = worker_pb2.Adapter(
                name=name,
                version=self._catalogue.next_version(),
                root=root,
                parent=current.parent if current is not None else "",
                created=int(time.time()),
                weight=weight,
                pin=pin,
                allowed_roots=self._roots,
            )
            self.staging.add((name, wanted.version))
            try:
                adapter = await self._stage(wanted)
                self._catalogue.put_adapter(adapter)
            finally:
                self.staging.discard((name, wanted.version))
            noted = await self._note(adapter)
            self._publish(adapter)
            if current is not None:
                self._retirement.add(current)
        self._tell(
            f"adapter {name} is version {adapter.version}, {adapter.digest}, from {adapter.place or root}", logging.INFO
        )
        if not noted:
            raise WorkerUnavailableError(
                "All workers were lost while the adapter was loaded. It is there when they are back, unless the "
                "controller is lost too: see GET /v1/models."
            )
        return adapter

    async def _unload(self, name: str) -> Freed:
        async with self._turns.of(name, takes_place=False):
            await self._know_names()
            if self._catalogue.adapter(name) is not None and not self._workers():
                raise WorkerUnavailableError("No worker is there to note the unload. Try again in a moment.")
            adapter = self._catalogue.drop_adapter(name)
            newest = self._catalogue.names.get(name)
            assert newest is not None
            noted = await self._note(newest)
            self._publish(newest)
            self._retirement.add(adapter)
        self._tell(f"adapter {name} is unloaded", logging.INFO)
        if not noted:
            raise WorkerUnavailableError(
                "The adapter is unloaded, but all workers were lost before they had noted it. Should the controller be "
                "lost too, it may be back: see GET /v1/models."
            )
        return await self._retirement.freed(adapter)

    async def _know_names(self) -> None:
        """Wait until all names are known: before, a name in use might seem free."""
        try:
            async with asyncio.timeout(KNOW_S):
                while not self._catalogue.knows_names:  # noqa: ASYNC110 - a pure catalogue has no events
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise WorkerUnavailableError("The fleet is just starting. Try again in a moment.") from None

    def _publish(self, newest: worker_pb2.Adapter) -> None:
        self._changed()
        for worker in self._workers():
            worker.catch_up(newest)

    def _check_allowed(self) -> None:
        if not self._allowed:
            raise NotFoundError(
                "Adapters cannot be loaded or unloaded at run time here. Start with --allow-runtime-lora-updates and "
                "--lora-root."
            )

    async def _stage(self, wanted: worker_pb2.Adapter) -> worker_pb2.Adapter:
        """Have every worker read the adapter, before any name stands for it.

        A worker that is lost or does not answer gets it when it is back; at least one must have read it.
        """
        reading: dict[Worker, asyncio.Task[worker_pb2.Adapter]] = {}
        try:
            while True:
                for worker in self._workers():
                    if worker not in reading:  # it joined, or came back, meanwhile
                        reading[worker] = self._keep(worker.register(wanted))
                awaited = [reading[worker] for worker in self._workers() if not reading[worker].done()]
                if not awaited or any(isinstance(_problem(task), LoRAFleetError) for task in reading.values()):
                    break
                await asyncio.wait(awaited, timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            return _agreed(wanted, list(reading.values()))
        except BaseException:
            for task in reading.values():
                task.cancel()
            await asyncio.gather(
                *(worker.unregister((wanted.name, wanted.version), FORGET_S) for worker in reading),
                return_exceptions=True,
            )
            raise
        finally:
            for task in reading.values():
                task.cancel()  # those of lost workers
                _problem(task)  # asyncio warns of an exception that is never retrieved

    async def _note(self, adapter: worker_pb2.Adapter) -> int:
        """Have the workers note what a name stands for. Return how many have."""
        answers = await asyncio.gather(*(worker.note([adapter]) for worker in self._workers()), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, grpc.aio.AioRpcError):
                raise answer
        return sum(answer is None for answer in answers)

    def _keep(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _problem(task: asyncio.Task[worker_pb2.Adapter]) -> BaseException | None:
    return task.exception() if task.done() and not task.cancelled() else None


def _agreed(wanted: worker_pb2.Adapter, reading: Sequence[asyncio.Task[worker_pb2.Adapter]]) -> worker_pb2.Adapter:
    """Return the adapter as all workers found it. Raises the first worker's error, or why there is no one answer."""
    for task in reading:
        problem = _problem(task)
        if problem is not None and not isinstance(problem, grpc.aio.AioRpcError):
            raise problem
    found = [task.result() for task in reading if task.done() and not task.cancelled() and _problem(task) is None]
    if not found:
        raise WorkerUnavailableError(
            "All workers were lost while they read the adapter. Nothing changed; try again in a moment."
            if reading
            else "No worker is there to load the adapter. Try again in a moment."
        )
    if len({adapter.digest for adapter in found}) > 1:
        raise AdapterRefusedError(
            f"{quoted(wanted.root)} is not the same on all workers. Give a path that they share, or a hub id.",
            reason="workers_disagree",
        )
    adapter = worker_pb2.Adapter()
    adapter.CopyFrom(found[0])
    if len({other.place for other in found}) > 1:  # each has its own path to it, and tells it by its digest
        adapter.place = ""
    return adapter


def _check_name(name: str, root: str) -> None:
    if not name or not root:
        raise InvalidRequestError("Both 'lora_name' and 'lora_path' must be given.", param="lora_name")
    if not is_adapter_name(name):
        raise InvalidRequestError(f"lora_name is {quoted(name)}; it must be {ADAPTER_NAME}.", param="lora_name")
    if len(root) > MAX_ROOT_CHARS or not root.isprintable():
        raise InvalidRequestError(
            f"lora_path is {quoted(root)}; it must be at most {MAX_ROOT_CHARS} printable characters.",
            param="lora_path",
        )
