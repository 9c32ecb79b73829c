"""Any history of loads, unloads and losses: an acknowledged change lasts while a part of the fleet that knows it lives.

A lost process forgets everything. No loss here takes the last memory of an acknowledged change: without the controller
and every worker that was told, only the start-up's configuration remains.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from adapter_fleet import Clock, Controller, FakeClient
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lorafleet.controller.fleet import adapters as adapters_module
from lorafleet.controller.fleet import retirement as retirement_module
from lorafleet.proto import worker_pb2
from lorafleet.workers.errors import (
    AdapterConflictError,
    AdapterRefusedError,
    UnknownModelError,
    WorkerUnavailableError,
)
from lorafleet.workers.server.adapter_names import AdapterNames

WORKERS = ("w0", "w1", "w2")
NAMES = st.sampled_from(["start", "sql", "legal"])
ROOTS = st.sampled_from(["/adapters/a", "/adapters/b", "/adapters/c", "/adapters/nowhere"])
START = worker_pb2.Adapter(
    name="start", version=1, root="/adapters/a", place="/adapters/a", digest="content a", created=1
)
NEVER_DONE = "Nothing changed|No worker is there|just starting"


class History(RuleBasedStateMachine):
    """allowed: the digests each name may stand for; None: nothing. Several after an unknown outcome."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(retirement_module, "FREE_S", 0.0)
        self.patch.setattr(retirement_module, "GRACE_S", 0.0)
        self.patch.setattr(adapters_module, "KNOW_S", 0.0)
        self.clock = Clock()
        self.contents: dict[tuple[str, int], str] = {}  # of all versions ever created
        self.clients = {name: self.start_worker() for name in WORKERS}
        self.controller = Controller(self.clients, self.clock, of_start=["start"])
        self.gateway = AdapterNames(["start"])  # as in its last table
        self.allowed: dict[str, set[str | None]] = {"start": {"content a"}, "sql": {None}, "legal": {None}}
        self.do(self.controller.settle(1))

    def teardown(self) -> None:
        self.do(self.controller.kill())
        self.loop.close()
        self.patch.undo()

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def start_worker(self) -> FakeClient:
        client = FakeClient(known={("start", 1): START}, registered=self.registered)
        client.names.note([START])
        return client

    def registered(self, adapter: worker_pb2.Adapter) -> None:
        """Check that no version ever stands for two contents."""
        key = adapter.name, adapter.version
        assert self.contents.setdefault(key, adapter.digest) == adapter.digest

    @rule(name=NAMES, root=ROOTS, load_inplace=st.booleans())
    def load(self, name: str, root: str, load_inplace: bool) -> None:
        content = root.replace("/adapters/", "content ")
        try:
            self.do(self.controller.updates.load(name, root, load_inplace=load_inplace))
        except (AdapterConflictError, AdapterRefusedError):
            pass
        except WorkerUnavailableError as error:
            if not any(said in error.message for said in NEVER_DONE.split("|")):
                self.allowed[name] |= {content}
        else:
            self.allowed[name] = {content}

    @rule(name=NAMES)
    def unload(self, name: str) -> None:
        try:
            self.do(self.controller.updates.unload(name))
        except UnknownModelError:
            pass
        except WorkerUnavailableError as error:
            if not any(said in error.message for said in NEVER_DONE.split("|")):
                self.allowed[name] |= {None}
        else:
            self.allowed[name] = {None}

    @precondition(lambda self: self.is_remembered(self.clients.values()))
    @rule(name=NAMES, root=ROOTS, is_load=st.booleans(), num_steps=st.integers(0, 12))
    def kill_the_controller_in_the_middle(self, name: str, root: str, is_load: bool, num_steps: int) -> None:
        updates = self.controller.updates
        work = updates.load(name, root, load_inplace=True) if is_load else updates.unload(name)
        content = root.replace("/adapters/", "content ") if is_load else None

        async def some_of_it() -> None:
            task = asyncio.ensure_future(work)
            for _ in range(num_steps):
                await asyncio.sleep(0)
            acknowledged = task.done() and not task.cancelled() and task.exception() is None
            await self.controller.kill()
            await asyncio.gather(task, return_exceptions=True)
            self.allowed[name] = {content} if acknowledged else self.allowed[name] | {content}

        self.do(some_of_it())
        self.controller = Controller(self.clients, self.clock, of_start=["start"], is_restart=True)

    @rule(worker=st.sampled_from(WORKERS))
    def kill_a_worker(self, worker: str) -> None:
        others = [client for name, client in self.clients.items() if name != worker]
        if self.is_remembered([self.controller, *others]):
            self.controller.lose(worker)
            self.clients[worker] = self.start_worker()

    @rule(worker=st.sampled_from(WORKERS))
    def kill_a_worker_and_the_controller(self, worker: str) -> None:
        others = [client for name, client in self.clients.items() if name != worker]
        if self.is_remembered(others):
            self.do(self.controller.kill())
            self.clients[worker] = self.start_worker()
            self.controller = Controller(self.clients, self.clock, of_start=["start"], is_restart=True)

    @rule()
    def kill_all_but_the_gateway(self) -> None:
        if self.is_remembered([self.gateway]):
            self.do(self.controller.kill())
            for worker in WORKERS:
                self.clients[worker] = self.start_worker()
            self.controller = Controller(self.clients, self.clock, of_start=["start"], is_restart=True)
            self.controller.catalogue.note(self.gateway.all())

    @rule(worker=st.sampled_from(WORKERS), reachable=st.booleans())
    def part(self, worker: str, reachable: bool) -> None:
        self.clients[worker].reachable = reachable

    @rule(worker=st.sampled_from(WORKERS), method=st.sampled_from(["register", "unregister", "note"]))
    def lose_an_answer(self, worker: str, method: str) -> None:
        self.clients[worker].lose_answers.add(method)

    @rule(seconds=st.sampled_from([0.0, 1.0, 100.0, -600.0]))
    def time_goes_by(self, seconds: float) -> None:
        self.clock.now += seconds
        self.do(self.controller.step())

    @rule()
    def all_is_well_again(self) -> None:
        """Check that every worker has exactly the adapters that names stand for."""
        self.clock.now += 10_000.0  # longer than any wait
        for client in self.clients.values():
            client.reachable = True
            client.lose_answers.clear()
        self.do(self.controller.settle())
        served = self.controller.names()
        for name, allowed in self.allowed.items():
            assert served.get(name) in allowed
            self.allowed[name] = {served.get(name)}
        versions = {(adapter.name, adapter.version) for adapter in self.controller.catalogue.adapters()}
        for name, client in self.clients.items():
            assert client.known.keys() == versions
            assert client.serves() == {adapter: {digest} for adapter, digest in served.items()}
            assert self.controller.lacking(name) == {}

    @invariant()
    def the_table_says_what_was_acknowledged(self) -> None:
        if self.controller.catalogue.is_complete:
            self.gateway.note(self.controller.catalogue.names.all())
            served = self.controller.names()
            for name, allowed in self.allowed.items():
                assert served.get(name) in allowed

    def is_remembered(self, holders: Any) -> bool:
        """Return whether, for each name, the newest version known to any of `holders` is an allowed one."""

        def names(holder: Any) -> AdapterNames:
            found = holder.catalogue.names if isinstance(holder, Controller) else getattr(holder, "names", holder)
            assert isinstance(found, AdapterNames)
            return found

        everyone = [names(holder) for holder in [self.controller, self.gateway, *self.clients.values()]]
        left = [names(holder) for holder in holders]

        def newest(of: Any, name: str) -> int:
            return max((adapter.version for names in of if (adapter := names.get(name)) is not None), default=0)

        return all(newest(left, name) == newest(everyone, name) for name in self.allowed)


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
