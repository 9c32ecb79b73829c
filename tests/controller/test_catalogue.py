"""The routing table: what changes it, and what stays known while no worker is up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lorafleet.controller.catalogue import Catalogue
from lorafleet.proto import worker_pb2
from lorafleet.workers.actor import WorkerReady
from lorafleet.workers.errors import UnknownModelError

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


@pytest.fixture
def catalogue() -> Catalogue:
    catalogue = Catalogue(names=("base", "base-alias"), root="/models/base", tokenizer_digest="tokenizer", created=1234)
    catalogue.adopt(
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
        ("sql", "digest-1", 1, "base"),
        ("json", "digest-2", 3, "base-alias"),
    ]
    assert table.adapters[0].lora_rank == 8
    (worker,) = table.workers
    assert (worker.worker_id, worker.generation, worker.address) == ("worker-a", 1, "127.0.0.1:1000")
    assert (worker.state, worker.max_num_seqs, worker.max_loras) == (READY, 16, 4)


def test_only_changes_make_a_new_version(catalogue: Catalogue) -> None:
    versions = [catalogue.table().version]
    for act, changes in (
        (lambda: catalogue.put_worker(WORKER, READY), True),
        (lambda: catalogue.put_worker(WORKER, READY), False),
        (lambda: catalogue.put_worker(WORKER, DRAINING), True),
        (lambda: catalogue.put_worker(replace(WORKER, generation=2), DRAINING), True),
        (lambda: catalogue.drop_worker("worker-b"), False),
        (lambda: catalogue.drop_worker("worker-a"), True),
        (lambda: catalogue.drop_worker("worker-a"), False),
    ):
        assert act() is changes
        versions.append(catalogue.table().version)
        assert versions[-1] - versions[-2] == changes


def test_a_lost_worker_leaves_the_table_and_the_models_stay(catalogue: Catalogue) -> None:
    catalogue.put_worker(WORKER, READY)
    catalogue.drop_worker("worker-a")
    table = catalogue.table()
    assert not table.workers
    assert [entry.name for entry in table.adapters] == ["sql", "json"]
    assert table.base.max_model_len == 128


def test_a_restarted_worker_takes_the_place_of_its_old_self(catalogue: Catalogue) -> None:
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
    other = Catalogue(names=("base",), root="", tokenizer_digest="", created=0)
    assert catalogue.table().incarnation and catalogue.table().incarnation != other.table().incarnation


def test_only_the_first_worker_tells_which_adapters_there_are(catalogue: Catalogue) -> None:
    catalogue.adopt([worker_pb2.Adapter(name="stray", version=1)])
    assert [adapter.name for adapter in catalogue.adapters()] == ["sql", "json"]


def test_a_version_is_never_used_again(catalogue: Catalogue) -> None:
    assert (catalogue.next_version("json"), catalogue.next_version("new")) == (4, 1)
    before = catalogue.version
    catalogue.put_adapter(worker_pb2.Adapter(name="json", version=4, digest="digest-4"))
    assert catalogue.drop_adapter("json").digest == "digest-4"
    assert catalogue.version == before + 2
    assert catalogue.adapter("json") is None
    assert catalogue.next_version("json") == 5


def test_a_name_that_is_not_there_cannot_be_dropped(catalogue: Catalogue) -> None:
    before = catalogue.version
    with pytest.raises(UnknownModelError, match="'nobody'"):
        catalogue.drop_adapter("nobody")
    assert catalogue.version == before
