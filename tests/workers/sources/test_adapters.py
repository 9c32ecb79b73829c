"""Sources of an adapter, without a network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorafleet.workers.errors import AdapterRefusedError
from lorafleet.workers.sources import hub
from lorafleet.workers.sources.adapters import resolve_adapter


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Requests made to the hub, which has only `org/there`."""
    ids: list[str] = []

    def download(hub_id: str, patterns: tuple[str, ...]) -> Path:
        ids.append(hub_id)
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(patterns)
        assert not any("bin" in pattern or pattern == "*" for pattern in patterns), "a pickle would be downloaded"
        if hub_id == "org/there":
            return Path("/cache/there")
        raise hub.HubError(f"{hub_id} is not on the hub.")

    monkeypatch.setattr(hub, "download", download)
    monkeypatch.setattr(hub, "list_files", lambda hub_id: [])
    return ids


def refusal(path_or_id: str, roots: list[str] | None = None) -> AdapterRefusedError:
    with pytest.raises(AdapterRefusedError) as caught:
        resolve_adapter(path_or_id, roots)
    return caught.value


def cache_folder(root: Path, *commits: str) -> Path:
    """A hub cache folder with snapshots made in this order."""
    folder = root / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "snapshots").mkdir()
    for i, commit in enumerate(commits):
        (folder / "snapshots" / commit).mkdir()
        os.utime(folder / "snapshots" / commit, (1000 + i, 1000 + i))
    return folder


def test_a_directory_is_itself_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str]) -> None:
    (tmp_path / "org" / "adapter").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("org/adapter", "./org/adapter", "~/org/adapter", f"{tmp_path}/org/adapter"):
        assert resolve_adapter(path).path == tmp_path / "org" / "adapter"
    assert not asked


@pytest.mark.parametrize(
    ("main", "chosen"),
    [("old\n", "old"), ("new", "new"), ("gone", "new"), (None, "new")],
    ids=["the older", "the newer", "not there", "no main"],
)
def test_a_cache_folder_stands_for_the_snapshot_of_main_else_the_newest(
    main: str | None, chosen: str, tmp_path: Path
) -> None:
    folder = cache_folder(tmp_path, "old", "new")
    if main is not None:
        (folder / "refs" / "main").write_text(main)
    assert resolve_adapter(str(folder)).path == folder / "snapshots" / chosen


def test_a_cache_folder_without_a_snapshot_is_refused(tmp_path: Path) -> None:
    folder = cache_folder(tmp_path)
    error = refusal(str(folder))
    assert error.reason == "not_found"
    assert folder.name in error.message


def test_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    file.touch()
    error = refusal(str(file))
    assert error.reason == "missing_directory"
    assert f"{file} is a file; give the adapter's directory" in error.message


@pytest.mark.parametrize(
    "path",
    ["./org/name", "/org/name", "~/org-name", "../org/name", "a/b/c", "name", "org/", "~no-such-user/name", "x" * 5000],
)
def test_a_missing_path_is_refused_and_never_asked_of_the_hub(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    error = refusal(path)
    assert error.reason == "missing_directory"
    assert path.removeprefix("~/").removeprefix("./").removesuffix("/")[:200] in error.message
    assert len(error.message) < 500
    assert not asked


def test_a_hub_id_is_asked_of_the_hub_and_its_failure_names_it(asked: list[str]) -> None:
    assert resolve_adapter("org/there").path == Path("/cache/there")
    error = refusal("org/missing")
    assert (error.reason, error.message) == ("not_found", "org/missing is not on the hub.")
    assert asked == ["org/there", "org/missing"]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Two roots with an adapter each, a link out of the first, and a secret outside."""
    for path in ("one/a", "one/team/b", "two/c", "secret"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "one" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "one" / "inner").symlink_to(tmp_path / "one" / "team")
    (tmp_path / "link-to-one").symlink_to(tmp_path / "one")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("{disk}/one/a", "one/a"),
        ("{disk}/two/c", "two/c"),
        ("{disk}/link-to-one/a", "one/a"),
        ("a", "one/a"),
        ("team/b", "one/team/b"),
        ("inner/b", "one/team/b"),
        ("./team/../a", "one/a"),
        ("c", "two/c"),
    ],
)
def test_what_lies_below_a_root_is_found_relative_paths_too(path: str, found: str, disk: Path) -> None:
    roots = [f"{disk}/one", f"{disk}/two"]
    assert resolve_adapter(path.format(disk=disk), roots).path == disk / found


@pytest.mark.parametrize(
    "path",
    ["{disk}/secret", "../secret", "{disk}/one/../secret", "link", "{disk}/one/link", "nowhere", "/", "~", "org/there"],
)
def test_what_lies_elsewhere_is_refused_whether_it_exists_or_not(path: str, disk: Path, asked: list[str]) -> None:
    error = refusal(path.format(disk=disk), [f"{disk}/one", f"{disk}/two"])
    assert error.reason == "outside_roots"
    assert "--lora-root" in error.message
    assert f"{disk}/two" not in error.message and str(disk) not in error.message.replace(path.format(disk=disk), "")
    assert not asked


@pytest.mark.parametrize(("path", "reason"), [("loop", "missing_directory"), ("models--org--name", "not_found")])
def test_what_is_broken_below_a_root_is_refused_without_the_roots_path(path: str, reason: str, tmp_path: Path) -> None:
    cache_folder(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    error = refusal(path, [str(tmp_path)])
    assert error.reason == reason
    assert path in error.message and str(tmp_path) not in error.message


def test_a_path_with_a_nul_is_refused(disk: Path) -> None:
    assert refusal("a\0b", [str(disk)]).reason == "missing_directory"


@pytest.mark.parametrize(("root", "allowed"), [("hf://", True), ("hf://org", True), ("hf://or", False)])
def test_hub_ids_need_a_root_of_their_own(
    root: str, allowed: bool, disk: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (disk / "org" / "there").mkdir(parents=True)
    monkeypatch.chdir(disk)  # a directory of that name in the worker's own directory must not count
    roots = [f"{disk}/one", root]
    if allowed:
        assert resolve_adapter("org/there", roots).path == Path("/cache/there")
    else:
        assert refusal("org/there", roots).reason == "outside_roots"
        assert not asked


def test_a_cache_folders_main_leads_nowhere_outside_it(tmp_path: Path) -> None:
    folder = cache_folder(tmp_path, "old", "new")
    (tmp_path / "secret").mkdir()
    (folder / "refs" / "main").write_text("../../secret")
    assert resolve_adapter(str(folder)).path == folder / "snapshots" / "new"
    (folder / "refs" / "main").unlink()
    (folder / "refs" / "main").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("old")
    assert resolve_adapter(str(folder)).path == folder / "snapshots" / "new"
    (folder / "snapshots" / "later").symlink_to(tmp_path / "secret")
    assert resolve_adapter(str(folder)).path == folder / "snapshots" / "new"


def test_a_cache_folder_whose_snapshots_all_lead_outside_is_refused(tmp_path: Path) -> None:
    folder = cache_folder(tmp_path)
    (folder / "snapshots" / "x").symlink_to(tmp_path)
    assert refusal(str(folder)).reason == "not_found"


def test_what_was_found_is_found_again_by_its_place_whatever_the_directory(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = [f"{disk}/link-to-one"]
    found = resolve_adapter("team/b", roots)
    monkeypatch.chdir("/")
    again = resolve_adapter(found.place, roots)
    assert (again.path, again.roots) == (found.path, found.roots) == (disk / "one/team/b", (disk / "one",))


def test_a_revision_is_part_of_a_hub_id_and_what_was_downloaded_is_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = cache_folder(tmp_path, "abc") / "snapshots" / "abc"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (snapshot / name).touch()
    monkeypatch.setattr(hub, "download", lambda hub_id, patterns: snapshot)
    for hub_id in ("org/name", "org/name@main", "org/name@refs/pr/1"):
        assert resolve_adapter(hub_id).place == "org/name@abc"


@pytest.mark.parametrize(
    ("files", "reason", "named"),
    [
        (
            ["checkpoint-9/adapter_config.json", "checkpoint-10/adapter_config.json"],
            "adapter_in_subfolder",
            "checkpoint-10",
        ),
        (["adapter_config.json", "adapter_model.bin"], "pickle", "adapter_model.bin"),
        (["config.json", "model-00001-of-00002.safetensors"], "whole_model", "whole model"),
        (["adapters.safetensors"], "mlx", "MLX"),
        (["model-q4.gguf"], "gguf", "model-q4.gguf"),
        (["README.md"], "not_peft", "adapter_config.json"),
    ],
)
def test_a_repository_without_an_adapter_at_its_top_is_described(
    files: list[str], reason: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "download", lambda hub_id, patterns: tmp_path)
    monkeypatch.setattr(hub, "list_files", lambda hub_id: files)
    error = refusal("org/name")
    assert error.reason == reason
    assert named in error.message and error.message.startswith("org/name ")
    assert str(tmp_path) not in error.message
