"""Sources of a base model, without a network."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lorafleet.workers.errors import ModelError
from lorafleet.workers.sources import hub
from lorafleet.workers.sources import models as source
from lorafleet.workers.sources.models import read_ahead, resolve_model


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Requests made to the hub, which has only `org/there`."""
    ids: list[str] = []

    def download(hub_id: str, patterns: object) -> Path:
        ids.append(hub_id)
        if hub_id == "org/there":
            return Path("/cache/there")
        raise hub.HubError(f"{hub_id} is not on the hub.")

    monkeypatch.setattr(hub, "download", download)
    return ids


def test_a_directory_is_itself_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for model in ("model", "./model", "~/model", f"{tmp_path}/model"):
        assert resolve_model(model) == tmp_path / "model"


def test_a_cache_folder_stands_for_the_snapshot_of_its_main_branch(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--name"
    for commit in ("old", "new"):
        (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("old\n")
    assert resolve_model(str(folder)) == folder / "snapshots" / "old"


def test_a_cache_folder_without_a_snapshot_is_refused(tmp_path: Path) -> None:
    (tmp_path / "models--org--name" / "snapshots").mkdir(parents=True)
    with pytest.raises(ModelError, match="without a snapshot"):
        resolve_model(str(tmp_path / "models--org--name"))


def test_a_gguf_file_is_converted_with_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "Model.GGUF"
    file.touch()
    calls = []

    def converted(path: Path, progress: Callable[[int, int], None]) -> Path:
        calls.append((path, progress))
        return tmp_path

    monkeypatch.setattr(source, "cached_gguf", converted)

    def progress(done: int, total: int) -> None: ...

    assert resolve_model(str(file), progress) == tmp_path
    assert calls == [(file, progress)]


def test_a_hub_id_is_asked_of_the_hub(asked: list[str]) -> None:
    assert resolve_model("org/there") == Path("/cache/there")
    with pytest.raises(ModelError, match="org/missing is not on the hub"):
        resolve_model("org/missing")
    assert asked == ["org/there", "org/missing"]


@pytest.mark.parametrize(
    "model", ["./org/name", "/org/name", "~/name", "../name", "a/b/c", "name", "", "org/", "~no-such-user/name"]
)
def test_what_looks_like_a_path_is_never_asked_of_the_hub(model: str, asked: list[str], tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        resolve_model(model or str(tmp_path / "missing"))
    assert not asked


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.touch()
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(str(file))


def test_read_ahead_asks_for_the_weights_and_forgives_what_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advised: list[tuple[str, tuple[int, ...]]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, *rest: advised.append((str(Path(f"/proc/self/fd/{fd}").readlink()), rest))
    )
    for name in ("model-1.safetensors", "model-2.safetensors", "config.json"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    read_ahead(tmp_path)
    assert advised == [(str(tmp_path / f"model-{n}.safetensors"), (0, 0, os.POSIX_FADV_WILLNEED)) for n in (1, 2)]
    read_ahead(tmp_path / "nowhere")
