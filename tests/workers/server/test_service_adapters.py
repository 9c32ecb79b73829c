"""Adapters over the worker's gRPC service: registered, listed, unregistered."""

from __future__ import annotations

import grpc.aio
from fake_worker import TIMEOUT_S, TOKEN, Worker, eventually, status

from lorafleet.proto import worker_pb2
from lorafleet.workers.engine.registered import FreedBytes
from lorafleet.workers.rpc import bearer


async def test_adapters_are_registered_listed_and_unregistered(worker: Worker) -> None:
    call = {"metadata": bearer(TOKEN), "timeout": TIMEOUT_S}
    async with worker.channel() as stub:
        reply = await stub.RegisterAdapter(
            worker_pb2.RegisterAdapterRequest(name="sql", version=3, root="/adapters/sql"), **call
        )
        assert (reply.adapter.name, reply.adapter.version, reply.adapter.digest) == ("sql", 3, "d")
        assert worker.registry.prefetched == ["sql"]
        refused = await stub.RegisterAdapter(worker_pb2.RegisterAdapterRequest(name="x", root="bad"), **call)
        assert (refused.failure.code, refused.failure.reason) == ("adapter_refused", "rank_too_large")
        assert refused.failure.message == "bad is bad."
        listed = await stub.ListAdapters(worker_pb2.ListAdaptersRequest(), **call)
        assert list(listed.adapters) == [reply.adapter]
        assert worker.registry.freed is not None
        worker.registry.freed.set_result(FreedBytes(20, 6))
        gone = await stub.UnregisterAdapter(worker_pb2.UnregisterAdapterRequest(name="sql", version=3), **call)
        assert (gone.found, gone.device_bytes, gone.host_bytes) == (True, 20, 6)
        unknown = await stub.UnregisterAdapter(worker_pb2.UnregisterAdapterRequest(name="sql", version=3), **call)
        assert not unknown.found


async def test_registrations_that_hang_hold_up_nothing_else(worker: Worker) -> None:
    call = {"metadata": bearer(TOKEN), "timeout": TIMEOUT_S}
    async with worker.channel() as stub, worker.session() as client:
        hung = [
            stub.RegisterAdapter(worker_pb2.RegisterAdapterRequest(name=f"x{n}", root="hangs"), metadata=bearer(TOKEN))
            for n in range(40)  # more than the event loop has threads
        ]
        reply = await stub.RegisterAdapter(worker_pb2.RegisterAdapterRequest(name="y", root="/y"), **call)
        assert reply.adapter.name == "y"
        listed = await stub.ListAdapters(worker_pb2.ListAdaptersRequest(), **call)
        assert [adapter.name for adapter in listed.adapters] == ["y"]
        await client.generate(1, [1])
        assert (await client.ending(1)).finish == worker_pb2.FINISH_LENGTH
        for waiting in hung:
            waiting.cancel()


async def test_an_unregistration_waits_until_all_is_free_and_goes_on_when_nobody_waits(worker: Worker) -> None:
    freed = worker.registry.freed
    assert freed is not None
    freed.set_running_or_notify_cancel()
    async with worker.channel() as stub:
        request = worker_pb2.RegisterAdapterRequest(name="sql", version=1, root="/adapters/sql")
        await stub.RegisterAdapter(request, metadata=bearer(TOKEN), timeout=TIMEOUT_S)
        forget = worker_pb2.UnregisterAdapterRequest(name="sql", version=1)
        assert await status(stub.UnregisterAdapter(forget, metadata=bearer(TOKEN), timeout=0.2)) is (
            grpc.StatusCode.DEADLINE_EXCEEDED
        )
    assert not freed.cancelled()
    freed.set_result(FreedBytes(0, 0))


async def test_what_names_stand_for_is_noted_and_told_again(worker: Worker) -> None:
    call = {"metadata": bearer(TOKEN), "timeout": TIMEOUT_S}
    told = [worker_pb2.Adapter(name="sql", version=1 << 40, digest="d"), worker_pb2.Adapter(name="x", unloaded=True)]
    async with worker.channel() as stub:
        await stub.NoteAdapters(worker_pb2.NoteAdaptersRequest(adapters=told), **call)
        assert list((await stub.ListAdapters(worker_pb2.ListAdaptersRequest(), **call)).names) == told


async def test_adapters_are_used_by_their_requests_and_for_a_while_by_those_that_were_cut(worker: Worker) -> None:
    async with worker.channel() as stub:

        async def used(cut_s: float) -> list[str]:
            request = worker_pb2.GetUseRequest(digests=["a", "b", "c", "d"], cut_s=cut_s)
            return list((await stub.GetUse(request, metadata=bearer(TOKEN), timeout=TIMEOUT_S)).digests)

        worker.engine.paused = True
        async with worker.session() as client:
            parts = [worker_pb2.ComposedAdapter(digest=digest, weight=1.0) for digest in "bc"]
            await client.generate(1, [1], max_tokens=1, adapter_digest="a")
            await client.generate(2, [1], max_tokens=1, composition=parts)
            await client.generate(3, [1], max_tokens=1)
            await eventually(lambda: worker.engine.num_running == 3)
            assert await used(0.0) == ["a", "b", "c"]
            worker.engine.resume()
            for stream in (1, 2, 3):
                await client.ending(stream)
            assert await used(60.0) == []
            worker.engine.paused = True
            await client.generate(4, [1], max_tokens=1, adapter_digest="d")
            await eventually(lambda: worker.engine.num_running == 1)
        await eventually(lambda: worker.service.num_unfinished == 0)
        assert await used(60.0) == ["d"] and await used(0.0) == []
