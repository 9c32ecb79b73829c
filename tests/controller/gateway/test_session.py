"""One worker's session by itself: handshake, liveness, numbering."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from lorafleet.controller.gateway.config import SessionTimes
from lorafleet.controller.gateway.delivery import SessionLost, deliver
from lorafleet.controller.gateway.inbox import Inbox
from lorafleet.controller.gateway.routing_table import Endpoint
from lorafleet.controller.gateway.session import WorkerSession
from lorafleet.proto import worker_pb2
from lorafleet.workers.engine.request import FinishReason, GenerateRequest
from lorafleet.workers.engine.sampling_options import SamplingOptions
from lorafleet.workers.errors import WorkerUnavailableError

TIMES = SessionTimes(welcome_s=0.2, suspect_s=0.3, dead_s=30.0, first_backoff_s=0.02, last_backoff_s=0.1)


@pytest.fixture
async def worker(new_worker: Callable[..., Any]) -> AsyncIterator[Any]:
    worker = new_worker()
    await worker.start()
    yield worker
    await worker.kill()


@pytest.fixture
async def session(worker: Any) -> AsyncIterator[WorkerSession]:
    endpoint = Endpoint(
        worker_id=worker.worker_id,
        generation=worker.generation,
        address=worker.address,
        max_num_seqs=8,
        max_loras=2,
        draining=False,
    )
    session = WorkerSession(endpoint, gateway_id="g", token="t", times=TIMES)
    yield session
    await session.close()


REQUEST = GenerateRequest("r", (7, 8), SamplingOptions(max_tokens=3))


async def test_tokens_arrive_and_the_stream_ends(session: WorkerSession, eventually: Callable[..., Any]) -> None:
    with pytest.raises(WorkerUnavailableError):
        session.submit(Inbox(9, lambda: None).open_queue(0), REQUEST)
    session.start()
    await eventually(lambda: session.view().ready)
    queue = Inbox(9, lambda: None).open_queue(0)
    assert session.submit(queue, REQUEST) == 1
    assert session.submit(Inbox(9, lambda: None).open_queue(0), REQUEST) == 2
    await eventually(lambda: queue.finish is FinishReason.LENGTH)
    assert queue.token_ids == [7, 8, 7]
    await eventually(lambda: session.num_streams == 0)
    session.cancel(1)  # ended: nothing happens


async def test_a_worker_that_does_not_welcome_is_tried_again(
    worker: Any, session: WorkerSession, eventually: Callable[..., Awaitable[None]]
) -> None:
    worker.welcome = False
    session.start()
    await eventually(lambda: len(worker.hellos) >= 2)
    assert not session.view().ready
    worker.welcome = True
    await eventually(lambda: session.view().ready)


async def test_silence_makes_a_worker_suspect_and_a_heartbeat_clears_it(
    worker: Any, session: WorkerSession, eventually: Callable[..., Awaitable[None]]
) -> None:
    session.start()
    await eventually(lambda: session.view().ready and not session.view().suspect)
    worker.heartbeats = False
    await eventually(lambda: session.view().suspect)
    assert session.view().ready
    worker.heartbeats = True
    await eventually(lambda: not session.view().suspect)


async def test_a_draining_worker_gets_nothing_new(
    worker: Any, session: WorkerSession, eventually: Callable[..., Awaitable[None]]
) -> None:
    session.start()
    await eventually(lambda: session.view().ready)
    worker.state = worker_pb2.WORKER_DRAINING
    await eventually(lambda: not session.view().ready)


def test_rows_of_unknown_streams_are_dropped_and_columns_must_fit() -> None:
    inbox = Inbox(9, lambda: None)
    streams = {1: inbox.open_queue(0), 2: inbox.open_queue(1)}
    deliver(
        worker_pb2.StepOutputs(
            stream=[9, 1, 2],
            token_id=[5, 6, 7],
            finish=[worker_pb2.FINISH_NONE, worker_pb2.FINISH_STOP, worker_pb2.FINISH_NONE],
            logprobs=[worker_pb2.Logprobs(row=2, logprob=-1.0, rank=1)],
        ),
        streams,
    )
    assert list(streams) == [2]
    assert [queue.take().token_ids for queue in inbox.ready] == [[6], [7]]
    with pytest.raises(SessionLost, match="columns"):
        deliver(worker_pb2.StepOutputs(stream=[2], token_id=[5]), streams)
