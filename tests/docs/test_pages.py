"""The documents keep their promises: every command says how it is tested, links and flags exist, nothing loads from
elsewhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from documents import PAGES, ROOT, RUN_LANGUAGES, Block, blocks, marked

MARKS = ("starts", "asks", "alone", "prints", "file", "in", "quoted", "not")
SOURCE = ("controller", "kernels", "proto", "workers")


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_snippet_says_how_it_is_tested(page: str) -> None:
    untested = [
        str(block)
        for block in blocks(page)
        if (block.language in RUN_LANGUAGES or block.mark) and block.mark.split(" ")[0] not in MARKS
    ]
    assert untested == [], "tests/documents.py lists the marks"


@pytest.mark.parametrize("page", PAGES)
def test_no_fence_is_left_open(page: str) -> None:
    assert len(re.findall(r"^ *```", (ROOT / page).read_text(), re.MULTILINE)) == 2 * len(blocks(page))


def test_what_is_not_run_says_so_to_the_reader() -> None:
    reasons = {str(block).split(":")[0]: block.mark for block in marked("not")}
    assert reasons == {
        "docs/guides/operating.md": "not run: needs a GPU",
        "docs/tutorial.md": "not run: needs the Hugging Face hub",
    }
    assert "None of\nthat has run on a GPU yet" in (ROOT / "docs/guides/operating.md").read_text()
    assert "needs the hub, so the test suite does not run it" in (ROOT / "docs/tutorial.md").read_text()


@pytest.mark.parametrize("block", marked("in"), ids=str)
def test_what_another_test_or_ci_runs_is_there(block: Block) -> None:
    file, _, test = block.mark.removeprefix("in ").partition("::")
    text = (ROOT / file).read_text()
    if not test:
        lines = [line for line in block.text.splitlines() if line]
        assert lines and set(lines) <= set(text.splitlines())
        return
    functions = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    assert test in functions
    if "lorafleet " in block.text:
        commands = re.findall(r"lorafleet (\w+)", block.text)
        assert [command for command in commands if f'"{command}"' not in text] == []


@pytest.mark.parametrize("block", marked("quoted"), ids=str)
def test_what_is_quoted_stands_so_in_the_source(block: Block) -> None:
    files = [file for folder in SOURCE for file in (ROOT / folder).rglob("*.py")]
    assert any(block.text in file.read_text() for file in files)


def test_the_first_commands_of_the_readme_are_the_demo_and_the_tests() -> None:
    commands = [block.text for block in blocks("README.md") if block.language == "bash"]
    assert commands[:2] == ["make demo\n", "make test\n"]


def test_links_of_the_readme_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_every_page_is_in_the_navigation() -> None:
    # mkdocs --strict finds entries without a page, and pages without an entry: `make docs`.
    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [f"docs/{entry}"]
        return [page for value in (entry.values() if isinstance(entry, dict) else entry) for page in pages(value)]

    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(pages(config["nav"])) == [page for page in PAGES if page != "README.md"]


def test_pages_load_nothing_from_elsewhere() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert config["theme"]["font"] is False
    assert not {"extra_css", "extra_javascript", "extra"} & set(config)
    loaded = re.compile(r"!\[|<img|<script|<iframe|```mermaid")  # mermaid comes from elsewhere
    assert [page for page in PAGES if loaded.search((ROOT / page).read_text())] == []


@pytest.mark.skipif(not (ROOT / "workers" / "scheduling").is_dir(), reason="the pages describe folders to come")
@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    folders = "benchmarks|controller|deploy|examples|kernels|proto|tests|workers"
    named = re.findall(rf"`((?:{folders})/[\w./-]*)`", (ROOT / page).read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_parser_sees_indented_blocks_and_their_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("documents.ROOT", tmp_path)
    (tmp_path / "page.md").write_text(
        "1. One\n\n    <!-- asks x -->\n    ```bash\n    a\n      b\n    ```\n```\nc\n```\n"
    )
    first, second = blocks("page.md")
    assert (first.mark, first.text, first.line) == ("asks x", "a\n  b\n", 4)
    assert (second.language, second.mark, second.text) == ("", "", "c\n")
