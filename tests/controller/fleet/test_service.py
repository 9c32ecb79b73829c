"""The controller's service over real gRPC: tables to watchers, files by digest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import grpc.aio
import pytest

from lorafleet.controller.fleet.adapters import AdapterUpdates
from lorafleet.controller.fleet.catalogue import Catalogue
from lorafleet.controller.fleet.retirement import Retirement
from lorafleet.controller.fleet.service import ControllerService, read_tokenizer_files
from lorafleet.proto import controller_pb2, controller_pb2_grpc, worker_pb2
from lorafleet.workers.errors import ModelError
from lorafleet.workers.rpc import CLIENT_OPTIONS, bearer, create_server
from lorafleet.workers.server.actor import WorkerReady
from lorafleet.workers.text.files import files_digest

TOKEN = "fleet-token"
TIMEOUT_S = 10.0
FILES = {"tokenizer.json": b"x" * (5 << 19), "chat_template.jinja": b"", "config.json": b"{}"}
WORKER = WorkerReady(
    worker_id="worker-a",
    generation=1,
    address="127.0.0.1:1",
    adapters=(),
    plan=(),
    max_model_len=128,
    vocab_size=300,
    max_num_seqs=16,
    max_loras=0,
)

STATUS = controller_pb2.WorkerStatus(name="lorafleet-worker-0", state="ready")


ADAPTERS_FILES = {"tokenizer.json": b"own"}


class Holder:
    """A worker with the files of an adapter."""

    async def files(self, digest: str) -> dict[str, bytes]:
        return ADAPTERS_FILES


class Fleet:
    """A served catalogue and a client of it."""

    def __init__(self, catalogue: Catalogue, service: ControllerService, stub: Any) -> None:
        self.catalogue = catalogue
        self.service = service
        self.stub = stub

    def put(self, state: worker_pb2.WorkerState = worker_pb2.WORKER_READY) -> None:
        if self.catalogue.put_worker(WORKER, state):
            self.service.changed()

    def drop(self) -> None:
        if self.catalogue.drop_worker(WORKER.worker_id):
            self.service.changed()

    def watch(self) -> Any:
        return self.stub.Watch(controller_pb2.WatchRequest(gateway_id="g"), metadata=bearer(TOKEN), timeout=TIMEOUT_S)


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    catalogue = Catalogue(
        names=("base",),
        root="/base",
        tokenizer_digest=files_digest(FILES),
        created=1,
        now_ms=lambda: 5000,
        fleet="fleet",
    )
    updates = AdapterUpdates(
        catalogue,
        Retirement(list, catalogue.digests, resume_s=1.0),
        list,
        lambda: service.changed(),
        allowed=True,
        roots=("/adapters",),
        tell=print,
    )
    service = ControllerService(
        catalogue,
        {files_digest(FILES): FILES},
        updates,
        workers=lambda: [STATUS],
        clients=lambda: cast(Any, [Holder()]),
    )
    server = create_server(TOKEN)
    cast(Any, controller_pb2_grpc.add_ControllerServicer_to_server)(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CLIENT_OPTIONS) as channel:
        yield Fleet(catalogue, service, cast(Any, controller_pb2_grpc.ControllerStub)(channel))
    await server.stop(None)


async def test_a_watcher_gets_the_table_and_then_every_change(fleet: Fleet) -> None:
    fleet.put()
    call = fleet.watch()
    first = await call.read()
    assert [worker.worker_id for worker in first.workers] == ["worker-a"]
    fleet.put(worker_pb2.WORKER_DRAINING)
    second = await call.read()
    assert second.workers[0].state == worker_pb2.WORKER_DRAINING
    fleet.drop()
    third = await call.read()
    assert not third.workers
    assert first.version < second.version < third.version
    assert first.incarnation == third.incarnation


async def test_all_watchers_get_a_change(fleet: Fleet) -> None:
    fleet.put()
    calls = [fleet.watch() for _ in range(5)]
    for call in calls:
        await call.read()
    fleet.drop()
    assert {(await call.read()).version for call in calls} == {fleet.catalogue.version}


async def test_a_controller_that_has_just_begun_does_not_say_that_there_are_no_workers(fleet: Fleet) -> None:
    """Gateways would drop their workers."""
    call = fleet.watch()
    reading = asyncio.ensure_future(call.read())
    done, _ = await asyncio.wait([reading], timeout=0.1)
    assert not done
    fleet.put()
    assert len((await reading).workers) == 1


async def test_files_come_in_chunks_that_name_them_empty_ones_too(fleet: Fleet) -> None:
    digest = files_digest(FILES)
    call = fleet.stub.GetFiles(worker_pb2.GetFilesRequest(digest=digest), metadata=bearer(TOKEN), timeout=TIMEOUT_S)
    got: dict[str, bytes] = {}
    async for chunk in call:
        assert len(chunk.data) <= 1 << 20
        got[chunk.name] = got.get(chunk.name, b"") + chunk.data
    assert got == FILES
    assert files_digest(got) == digest


async def test_an_adapters_files_come_from_a_worker(fleet: Fleet) -> None:
    request = worker_pb2.GetFilesRequest(digest=files_digest(ADAPTERS_FILES))
    chunk = await fleet.stub.GetFiles(request, metadata=bearer(TOKEN), timeout=TIMEOUT_S).read()
    assert {chunk.name: chunk.data} == ADAPTERS_FILES


@pytest.mark.parametrize(("of", "names"), [("fleet", ["sql"]), ("another", []), ("", [])])
async def test_a_controller_without_memory_learns_names_from_the_gateways_of_its_fleet(
    of: str, names: list[str], fleet: Fleet
) -> None:
    fleet.put()
    learned: list[bool] = []
    fleet.service._learned = lambda: learned.append(True)
    request = controller_pb2.WatchRequest(
        gateway_id="g",
        fleet=of,
        adapters=[
            worker_pb2.Adapter(name="sql", version=7, digest="d", place="/adapters/sql"),
            worker_pb2.Adapter(name="gone", version=8, unloaded=True),
        ],
    )
    table = await fleet.stub.Watch(request, metadata=bearer(TOKEN), timeout=TIMEOUT_S).read()
    assert [adapter.name for adapter in table.adapters] == names
    assert [adapter.name for adapter in table.unloaded] == (["gone"] if names else [])
    assert bool(learned) == bool(names), "workers are to follow"


async def test_files_of_an_unknown_digest_are_not_found(fleet: Fleet) -> None:
    request = worker_pb2.GetFilesRequest(digest="other")
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await fleet.stub.GetFiles(request, metadata=bearer(TOKEN), timeout=TIMEOUT_S).read()
    assert failed.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_refusal_comes_back_as_its_own_error(fleet: Fleet) -> None:
    call = {"metadata": bearer(TOKEN), "timeout": TIMEOUT_S}
    load = controller_pb2.LoadAdapterRequest(name="base", root="/adapters/a")
    assert (await fleet.stub.LoadAdapter(load, **call)).failure.code == "adapter_conflict"
    unload = controller_pb2.UnloadAdapterRequest(name="nobody")
    assert (await fleet.stub.UnloadAdapter(unload, **call)).failure.code == "model_not_found"


@pytest.mark.parametrize("metadata", [None, bearer("wrong")])
async def test_every_call_needs_the_fleets_token(fleet: Fleet, metadata: Any) -> None:
    fleet.put()
    for call in (
        fleet.stub.Watch(controller_pb2.WatchRequest(), metadata=metadata, timeout=TIMEOUT_S),
        fleet.stub.GetFiles(worker_pb2.GetFilesRequest(), metadata=metadata, timeout=TIMEOUT_S),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call.read()
        assert failed.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_the_tokenizers_files_are_read_and_the_weights_are_not(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "config.json", "model.safetensors", "secret.txt"):
        (tmp_path / name).write_text(name)
    assert read_tokenizer_files(tmp_path) == {"tokenizer.json": b"tokenizer.json", "config.json": b"config.json"}


def test_a_model_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        read_tokenizer_files(tmp_path)


def test_the_digest_is_of_names_and_contents() -> None:
    files = [{"a": b"1", "b": b"2"}, {"a": b"12", "b": b""}, {"a": b"1"}, {"b": b"1", "a": b"2"}]
    assert len({files_digest(variant) for variant in files}) == len(files)
    assert files_digest({"b": b"2", "a": b"1"}) == files_digest(files[0])


async def test_the_status_has_the_tables_version_and_the_wanted_workers(fleet: Fleet) -> None:
    fleet.put()
    status = await fleet.stub.GetStatus(controller_pb2.StatusRequest(), metadata=bearer(TOKEN), timeout=TIMEOUT_S)
    assert (status.incarnation, status.version) == (fleet.catalogue.incarnation, fleet.catalogue.version)
    assert list(status.workers) == [STATUS]
