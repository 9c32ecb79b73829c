"""Loading of the C++ kernels, and their threads."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from lorafleet.kernels import native
from lorafleet.kernels.linear import linear, prepare
from lorafleet.kernels.norm import rms_norm


def helpers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("lorafleet-kernels")]


def test_a_thread_has_as_many_threads_as_it_asked_for_and_they_end_with_it() -> None:
    before = len(helpers())
    seen: list[int] = []

    def ask() -> None:
        assert native.get_threads() == 1
        for count in (3, 3, 2, 1, 4):
            native.set_threads(count)
            rms_norm(torch.randn(64, 64), torch.ones(64), 1e-5)
            seen.append(len(helpers()) - before)
        assert native.get_threads() == 4

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert seen == [2, 2, 1, 0, 3]
    gc.collect()
    assert len(helpers()) == before


def test_threads_that_never_come_are_not_waited_for() -> None:
    library = native.library()
    x = torch.randn(64, 32)
    expected = rms_norm(x, torch.ones(32), 1e-5)

    def compute() -> None:
        team = library.lf_team_create(5)
        library.lf_team_use(team)
        outputs.append(rms_norm(x, torch.ones(32), 1e-5))
        library.lf_team_use(None)
        library.lf_team_free(team)

    outputs: list[torch.Tensor] = []
    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    assert torch.equal(outputs[0], expected)


@pytest.mark.parametrize("rows", [1, 4, 33])
def test_the_number_of_threads_changes_no_result(rows: int) -> None:
    x = torch.randn(rows, 576).bfloat16()
    weight = prepare(torch.randn(1000, 576).bfloat16(), packed=True)
    results: list[torch.Tensor] = []

    def compute(num_threads: int) -> None:
        native.set_threads(num_threads)
        results.extend(linear(x, weight) for _ in range(20))

    for num_threads in (1, 2, 5):
        thread = threading.Thread(target=compute, args=(num_threads,))
        thread.start()
        thread.join()
    assert len(results) == 60 and all(torch.equal(result, results[0]) for result in results)


def test_without_a_compiler_the_references_run_after_one_warning(tmp_path: Path) -> None:
    code = """
import warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from lorafleet.kernels.norm import rms_norm
    for _ in range(3):
        y = rms_norm(torch.ones(2, 4), torch.ones(4), 0.0)
assert torch.equal(y, torch.ones(2, 4))
ours = [str(w.message) for w in caught if "LoRAFleet" in str(w.message)]
assert len(ours) == 1 and "compiler" in ours[0], ours
"""
    environment = {"PATH": "/nonexistent", "LORAFLEET_CACHE": str(tmp_path), "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
