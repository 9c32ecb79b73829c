"""Adapters that are loaded and unloaded while the fleet serves: on every worker, then in the table, or not at all.

Owns: the order of the two phases, and that a worker that comes back knows what the table names. Leaves to others: what
is published (catalogue.py), the calls (worker_client.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import grpc.aio

from lorafleet.controller.catalogue import Catalogue
from lorafleet.controller.worker_client import WorkerClient
from lorafleet.proto import worker_pb2
from lorafleet.workers.engine.request import MAX_NAME_CHARS, MAX_WEIGHT, MIN_WEIGHT
from lorafleet.workers.errors import (
    AdapterConflictError,
    AdapterRefusedError,
    InvalidRequestError,
    LoRAFleetError,
    NotFoundError,
    WorkerUnavailableError,
)
from lorafleet.workers.text.files import files_digest

_T = TypeVar("_T")

GRACE_S = 2.0  # between a new table and the end of what it no longer names: requests that gateways have just resolved
FREE_S = 30.0  # that an unload waits for running requests; afterwards they go on, and what they use is freed later


@dataclass(frozen=True, slots=True)
class Freed:
    """What an unload has given back, on all workers together."""

    device_bytes: int
    host_bytes: int
    num_draining: int  # workers that still finish requests, and free later


class AdapterUpdates:
    """One at a time for each name; different names do not wait for each other."""

    def __init__(
        self,
        catalogue: Catalogue,
        workers: Callable[[], Collection[WorkerClient]],
        changed: Callable[[], None],
        *,
        allowed: bool,
        roots: Sequence[str],
        tell: Callable[[str, int], None],
    ) -> None:
        """workers: those in the table. changed: called after each change of the catalogue. tell: called with a line and
        its log level for what happens to an adapter."""
        self._tell = tell
        self._catalogue = catalogue
        self._workers = workers
        self._changed = changed
        self._allowed = allowed
        self._roots = roots
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def load(
        self, name: str, root: str, *, load_inplace: bool, weight: float = 1.0, pin: bool = False
    ) -> worker_pb2.Adapter:
        """Read and verify what lies at `root` on every worker, then let `name` stand for it.

        weight, pin: see Adapter in worker.proto. Raises `AdapterConflictError` for a name that is taken (unless
        load_inplace), `AdapterRefusedError`, `WorkerUnavailableError`; the name then stands for what it did.
        """
        self._check_allowed()
        _check_name(name, root)
        if not MIN_WEIGHT <= weight <= MAX_WEIGHT:  # false for NaN too
            raise InvalidRequestError(
                f"weight is {weight}; it must be between {MIN_WEIGHT:g} and {MAX_WEIGHT:g}.", param="weight"
            )
        if name in self._catalogue.base_names:
            raise AdapterConflictError(f"{name!r} is a name of the base model. Choose another.", param="lora_name")
        # A caller who does not wait for it leaves nothing half done.
        return await asyncio.shield(self._keep(self._load(name, root, load_inplace, weight, pin)))

    async def _load(self, name: str, root: str, load_inplace: bool, weight: float, pin: bool) -> worker_pb2.Adapter:
        async with self._lock(name):
            current = self._catalogue.adapter(name)
            if current is not None and not load_inplace:
                raise AdapterConflictError(
                    f"The LoRA adapter {name!r} has already been loaded, from {current.root}. Set 'load_inplace' to "
                    "true to replace it, or unload it first.",
                    param="lora_name",
                )
            wanted = worker_pb2.Adapter(
                name=name,
                version=self._catalogue.next_version(name),
                root=root,
                parent=current.parent if current is not None else "",
                created=int(time.time()),
                weight=weight,
                pin=pin,
            )
            workers = list(self._workers())
            adapter = await self._stage(wanted, workers)
            self._catalogue.put_adapter(adapter)
            self._changed()
            if current is not None:
                self._keep(self._free(current))
            for worker in self._workers():
                if worker not in workers:  # it came (back) meanwhile
                    await self.sync(worker)
        self._tell(f"adapter {name} is version {adapter.version}, {adapter.digest}, from {root}", logging.INFO)
        return adapter

    async def unload(self, name: str) -> Freed:
        """Take a name out of the table, let its requests finish, and have its memory freed.

        Raises `UnknownModelError`.
        """
        self._check_allowed()
        async with self._lock(name):
            adapter = self._catalogue.drop_adapter(name)
            self._changed()
        self._tell(f"adapter {name} is unloaded", logging.INFO)
        return await asyncio.shield(self._keep(self._free(adapter)))

    async def sync(self, worker: WorkerClient) -> list[str]:
        """Make a worker know just what the catalogue names; the names of those it cannot have.

        On return nothing is to be done any more, so that a caller who does not wait in between can publish the worker.
        """
        failed: set[tuple[str, int]] = set()
        known = {(adapter.name, adapter.version): adapter for adapter in await worker.adapters()}
        self._catalogue.adopt(known.values())
        while True:
            wanted = {(adapter.name, adapter.version): adapter for adapter in self._catalogue.adapters()}
            missing = [wanted[key] for key in wanted.keys() - known.keys() - failed]
            surplus = [
                adapter for key, adapter in known.items() if key not in wanted or wanted[key].digest != adapter.digest
            ]
            if not missing and not surplus:
                return sorted(name for name, _ in failed)
            for adapter in surplus:
                del known[adapter.name, adapter.version]
                await self._unregister(worker, adapter)
            for adapter in missing:
                try:
                    found = await worker.register(adapter, ())
                    if found.digest != adapter.digest:
                        await self._unregister(worker, adapter)
                        raise AdapterRefusedError(
                            f"{adapter.root} is not what was loaded as {adapter.name!r} any more. Load it in place.",
                            reason="changed",
                        )
                except LoRAFleetError as error:
                    self._tell(f"adapter {adapter.name} cannot be loaded again: {error.message}", logging.ERROR)
                    failed.add((adapter.name, adapter.version))
                else:
                    known[adapter.name, adapter.version] = adapter

    async def files(self, digest: str) -> dict[str, bytes] | None:
        """An adapter's tokenizer and template, from a worker that has them; None: none has."""
        for worker in list(self._workers()):
            try:
                files = await worker.files(digest)
            except grpc.aio.AioRpcError:
                continue
            if files_digest(files) == digest:
                return files
        return None

    async def close(self) -> None:
        """Stop whatever is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _check_allowed(self) -> None:
        if not self._allowed:
            raise NotFoundError(
                "Adapters cannot be loaded or unloaded at run time here. Start with --allow-runtime-lora-updates and "
                "--lora-root."
            )

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    async def _stage(self, wanted: worker_pb2.Adapter, workers: Sequence[WorkerClient]) -> worker_pb2.Adapter:
        """Have every worker read it; nobody names it yet."""
        if not workers:
            raise WorkerUnavailableError("No worker is there to load the adapter. Try again in a moment.")
        answers = await asyncio.gather(
            *(worker.register(wanted, self._roots) for worker in workers), return_exceptions=True
        )
        found = [answer for answer in answers if isinstance(answer, worker_pb2.Adapter)]
        problems = [answer for answer in answers if isinstance(answer, BaseException)]
        if not problems and len({adapter.digest for adapter in found}) == 1:
            return found[0]
        await asyncio.gather(*(self._unregister(worker, wanted) for worker in workers))
        for problem in problems:
            if isinstance(problem, grpc.aio.AioRpcError):
                raise WorkerUnavailableError(
                    f"A worker was lost while it read the adapter ({problem.code().name}). Nothing changed; try again."
                ) from problem
            raise problem
        raise AdapterRefusedError(
            f"{wanted.root} is not the same on all workers. Give a path that they share, or a hub id.",
            reason="workers_disagree",
        )

    def _keep(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _free(self, adapter: worker_pb2.Adapter) -> Freed:
        await asyncio.sleep(GRACE_S)
        replies = await asyncio.gather(*(self._unregister(worker, adapter) for worker in self._workers()))
        return Freed(
            sum(reply.device_bytes for reply in replies if reply is not None),
            sum(reply.host_bytes for reply in replies if reply is not None),
            sum(reply is None for reply in replies),
        )

    async def _unregister(
        self, worker: WorkerClient, adapter: worker_pb2.Adapter
    ) -> worker_pb2.UnregisterAdapterReply | None:
        """None: it still drains. A worker that is lost has nothing to free; when it is back, `sync` sees to it."""
        try:
            return await worker.unregister(adapter, FREE_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return None
            return worker_pb2.UnregisterAdapterReply()


def _check_name(name: str, root: str) -> None:
    if not name or not root:
        raise InvalidRequestError("Both 'lora_name' and 'lora_path' must be given.", param="lora_name")
    if len(name) > MAX_NAME_CHARS or not name.isprintable() or name != name.strip():
        raise InvalidRequestError(
            f"lora_name must be at most {MAX_NAME_CHARS} printable characters without blanks around them.",
            param="lora_name",
        )
