"""An adapter's copies in pieces, and what adapters of one form share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from lorafleet.workers.adapters.format import HostAdapter, LinearChange, load_adapter
from lorafleet.workers.adapters.format import read_spec as read_adapter_spec
from lorafleet.workers.model import slot_write
from lorafleet.workers.model.architecture import read_spec
from lorafleet.workers.model.slot_write import PreparedForms, SlotRows, SlotWrite


def make_adapter(value: float) -> HostAdapter:
    change = LinearChange(torch.full((2, 8), value), torch.full((2, 4), value), 1.0)
    return HostAdapter(digest="digest", weights={(0, "q_proj"): change}, num_bytes=96)


def prepare(adapter: HostAdapter, places: torch.Tensor, numbers: torch.Tensor) -> SlotRows:
    rows = SlotRows()
    rows.add(places, adapter.weights[0, "q_proj"].a_RI)
    rows.add_numbers(numbers.transpose(0, 1), [2], [0.5], [0])
    return rows


def test_pieces_come_to_the_whole_and_numbers_keep_their_bits() -> None:
    places, numbers = torch.zeros(3, 2, 8), torch.zeros(3, 3, 1, dtype=torch.int32)
    adapter = make_adapter(7.0)
    done: list[str] = []
    write = SlotWrite(
        1, adapter, prepare(adapter, places, numbers).copies(adapter.storage()), lambda: done.append("committed")
    )
    assert not write.advance(max_bytes=1)
    assert write.advance(max_bytes=1)
    write.commit()
    assert done == ["committed"]
    assert places[1].eq(7.0).all() and not places[[0, 2]].any()
    assert (numbers[0, 1].item(), numbers[1].view(torch.float32)[1].item(), numbers[2, 1].item()) == (2, 0.5, 0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with adapters: two that differ in their values alone, and others."""
    directory = tmp_path_factory.mktemp("forms")
    options: dict[str, dict[str, Any]] = {
        "first": {"seed": 1},
        "second": {"seed": 2},
        "stronger": {"seed": 1, "lora_alpha": 99},
        "fewer": {"seed": 1, "targets": ["q_proj"]},
        "dora": {"seed": 1, "use_dora": True},
    }
    for name, option in options.items():
        model = tiny.make_model("smollm2", directory / "model")
        tiny.make_adapter(model, directory / name, rank=3, **option)
    return directory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_that_differ_in_their_values_alone_share_a_list(directory: Path, dtype: torch.dtype) -> None:
    spec = read_spec(directory / "model")

    def load(name: str) -> HostAdapter:
        adapter = read_adapter_spec(directory / name, spec.base_shapes, max_lora_rank=8)
        return load_adapter(adapter, spec.base_shapes, dtype)

    first, second = load("first"), load("second")
    assert first.form is not None and first.form == second.form == load("first").form
    assert first.form not in (load("stronger").form, load("fewer").form)
    assert load("dora").form is None, "its norms are its own"

    def rows(adapter: HostAdapter) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [
            (torch.zeros(2, *source.shape, dtype=dtype), source)
            for change in adapter.weights.values()
            for source in (change.a_RI, change.b_RO)
        ]

    places = rows(first)
    out = SlotRows()
    for place, source in places:
        out.add(place, source)
    out.add_numbers(torch.zeros(2, 3, 1, dtype=torch.int32), [3], [2.0], [0])
    prepared = out.copies(first.storage())
    if not prepared.copies.is_native:
        pytest.skip("without kernels a list knows one adapter's memory")
    for slot, adapter in enumerate((first, second)):
        assert SlotWrite(slot, adapter, prepared, lambda: None).advance(max_bytes=1 << 30)
        for (place, _), (_, source) in zip(places, rows(adapter), strict=True):
            assert torch.equal(place[slot], source)
    assert not torch.equal(places[0][0][0], places[0][0][1])


def test_only_the_forms_used_last_are_known(directory: Path) -> None:
    spec = read_spec(directory / "model")
    adapter = read_adapter_spec(directory / "first", spec.base_shapes, max_lora_rank=8)
    loaded = load_adapter(adapter, spec.base_shapes, torch.float32)
    assert loaded.form is not None
    places, numbers = (
        torch.zeros(2, 3, loaded.weights[0, "q_proj"].a_RI.shape[1]),
        torch.zeros(3, 2, 1, dtype=torch.int32),
    )
    prepared = prepare(loaded, places, numbers).copies(loaded.storage())
    known = PreparedForms()
    forms = [
        loaded.form._replace(config=replace(loaded.form.config, lora_alpha=float(n)))
        for n in range(slot_write._MAX_FORMS + 1)
    ]
    for form in forms:
        known.put(form, prepared)
    if not prepared.copies.is_native:
        pytest.skip("without kernels none are kept")
    assert known.get(forms[0]) is None
    assert all(known.get(form) is not None for form in forms[1:])
