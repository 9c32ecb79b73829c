"""The routing table: its changes, and what it keeps while no worker is up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from lorafleet.controller.fleet.catalogue import Catalogue
from lorafleet.proto import controller_pb2, worker_pb2
from lorafleet.workers.errors import UnknownModelError
from lorafleet.workers.server.actor import WorkerReady

READY, DRAINING = worker_pb2.WORKER_READY, worker_pb2.WORKER_DRAINING
WORKER = WorkerReady(
    worker_id="worker-a",
    generation=1,
    address="127.0.0.1:1000",
    adapters=(),
    plan=("memory plan",),
    max_model_len=128,
    vocab_size=300,
    max_num_seqs=16,
    max_loras=4,
)


def make_catalogue(names: tuple[str, ...] = ("base",), now_ms: int = 0) -> Catalogue:
    return Catalogue(
        names=names, root="/models/base", tokenizer_digest="tokenizer", created=1234, now_ms=lambda: now_ms, fleet="f"
    )


@pytest.fixture
def catalogue() -> Catalogue:
    catalogue = make_catalogue(names=("base", "base-alias"))
    catalogue.note(
        [
            worker_pb2.Adapter(name="json", digest="digest-2", version=3, root="org/json", parent="base-alias"),
            worker_pb2.Adapter(name="json", digest="digest-0", version=2, root="org/json"),
            worker_pb2.Adapter(name="sql", digest="digest-1", version=1, root="/adapters/sql", lora_rank=8),
        ]
    )
    return catalogue


def test_the_table_says_what_is_served_and_where(catalogue: Catalogue) -> None:
    catalogue.put_worker(WORKER, READY)
    table = catalogue.table()
    assert list(table.base.names) == ["base", "base-alias"]
    assert (table.base.root, table.base.created, table.base.tokenizer_digest) == ("/models/base", 1234, "tokenizer")
    assert (table.base.max_model_len, table.base.vocab_size) == (128, 300)
    assert [(entry.name, entry.digest, entry.version, entry.parent) for entry in table.adapters] == [
        ("json", "digest-2", 3, "base-alias"),
        ("sql", "digest-1", 1, "base"),
    ]
    assert table.adapters[1].lora_rank == 8
    (worker,) = table.workers
    assert (worker.worker_id, worker.generation, worker.address) == ("worker-a", 1, "127.0.0.1:1000")
    assert (worker.state, worker.max_num_seqs, worker.max_loras) == (READY, 16, 4)


def test_only_changes_make_a_new_version(catalogue: Catalogue) -> None:
    versions = [catalogue.table().version]
    acts: list[tuple[Callable[[], bool], bool]] = [
        (lambda: catalogue.put_worker(WORKER, READY), True),
        (lambda: catalogue.put_worker(WORKER, READY), False),
        (lambda: catalogue.put_worker(WORKER, DRAINING), True),
        (lambda: catalogue.put_worker(replace(WORKER, generation=2), DRAINING), True),
        (lambda: catalogue.drop_worker("worker-b"), False),
        (lambda: catalogue.drop_worker("worker-a"), True),
        (lambda: catalogue.drop_worker("worker-a"), False),
    ]
    for act, changes in acts:
        assert act() is changes
        versions.append(catalogue.table().version)
        assert versions[-1] - versions[-2] == changes


def test_a_lost_worker_leaves_the_table_and_the_models_stay(catalogue: Catalogue) -> None:
    catalogue.put_worker(WORKER, READY)
    catalogue.drop_worker("worker-a")
    table = catalogue.table()
    assert not table.workers
    assert [entry.name for entry in table.adapters] == ["json", "sql"]
    assert table.base.max_model_len == 128


def test_a_restarted_worker_replaces_its_former_process(catalogue: Catalogue) -> None:
    catalogue.put_worker(WORKER, READY)
    catalogue.drop_worker("worker-a")
    catalogue.put_worker(replace(WORKER, worker_id="worker-b", address="127.0.0.1:2000"), READY)
    assert [worker.worker_id for worker in catalogue.table().workers] == ["worker-b"]


def test_it_is_complete_from_the_first_worker_on(catalogue: Catalogue) -> None:
    assert not catalogue.is_complete
    catalogue.put_worker(WORKER, READY)
    catalogue.drop_worker("worker-a")
    assert catalogue.is_complete


def test_every_run_of_the_controller_is_an_incarnation_of_its_own(catalogue: Catalogue) -> None:
    other = make_catalogue()
    assert other.table().fleet == catalogue.table().fleet == "f"
    assert catalogue.table().incarnation and catalogue.table().incarnation != other.table().incarnation


def test_the_newest_version_counts_in_whatever_order_versions_are_told(catalogue: Catalogue) -> None:
    before = catalogue.version
    old = worker_pb2.Adapter(name="json", version=1, digest="old")
    assert not catalogue.note([old, worker_pb2.Adapter(name="sql", version=1, digest="digest-1")])
    assert catalogue.version == before
    assert catalogue.note([worker_pb2.Adapter(name="json", version=7, unloaded=True)])
    assert not catalogue.note([worker_pb2.Adapter(name="json", version=6, digest="late")])
    assert catalogue.version == before + 1
    table = catalogue.table()
    assert [adapter.name for adapter in table.adapters] == ["sql"]
    assert [(adapter.name, adapter.version) for adapter in table.unloaded] == [("json", 7)]


def test_a_name_of_the_base_model_is_never_an_adapters(catalogue: Catalogue) -> None:
    assert not catalogue.note([worker_pb2.Adapter(name="base-alias", version=9, digest="d")])
    assert catalogue.adapter("base-alias") is None


def test_a_version_is_never_assigned_again() -> None:
    catalogue = make_catalogue(now_ms=5000)
    assert [catalogue.next_version(), catalogue.next_version()] == [5000, 5001]
    catalogue.see([9000, 3])
    assert catalogue.next_version() == 9001
    catalogue.note([worker_pb2.Adapter(name="sql", version=9500, unloaded=True)])
    assert catalogue.next_version() == 9501


def test_an_unloaded_name_stands_for_nothing_until_it_is_loaded_again(catalogue: Catalogue) -> None:
    before = catalogue.version
    assert catalogue.drop_adapter("json").digest == "digest-2"
    assert catalogue.adapter("json") is None and catalogue.version == before + 1
    newest = catalogue.names.get("json")
    assert newest is not None and newest.unloaded and newest.version > 3
    catalogue.put_adapter(worker_pb2.Adapter(name="json", version=catalogue.next_version(), digest="digest-4"))
    assert catalogue.digests() == {"digest-1", "digest-4"}
    assert not catalogue.table().unloaded


def test_nothing_is_published_before_all_who_may_know_of_adapters_are_heard(catalogue: Catalogue) -> None:
    catalogue.await_word(["w0", "w1"])
    catalogue.put_worker(WORKER, READY)
    assert not catalogue.is_complete
    assert catalogue.heard("w0") and not catalogue.heard("w0") and not catalogue.is_complete
    assert catalogue.heard("w1") and catalogue.is_complete


def test_the_table_says_what_each_worker_lacks(catalogue: Catalogue) -> None:
    lacking = [controller_pb2.LackingAdapter(name="sql", digest="digest-1", reason="changed")]
    catalogue.put_worker(WORKER, READY, lambda: lacking)
    assert list(catalogue.table().workers[0].lacking) == lacking
    before = catalogue.version
    lacking.clear()
    catalogue.lacking_changed()
    assert catalogue.version == before + 1 and not catalogue.table().workers[0].lacking


def test_a_name_that_is_not_there_cannot_be_dropped(catalogue: Catalogue) -> None:
    before = catalogue.version
    with pytest.raises(UnknownModelError, match="'nobody'"):
        catalogue.drop_adapter("nobody")
    assert catalogue.version == before
