"""The documents that users read, and how each of their commands and snippets is tested.

A fenced block of a language that runs, and whatever else a test needs, has a mark before it. Readers do not see it:

    <!-- starts NAME -->       a command that starts a server; the same server wherever the same command stands
    <!-- asks NAME -->         runs while that server does
    <!-- alone -->             runs by itself; Python blocks of one page are one program
    <!-- prints -->            exactly what the block before it prints
    <!-- file NAME -->         a file that the page's commands name
    <!-- in .ci/run -->        a line of that script
    <!-- in FILE::TEST -->     that test runs these commands, with values of its own
    <!-- quoted -->            stands so in the source
    <!-- not run: REASON -->   the page says so too
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUN_LANGUAGES = ("bash", "python")
PAGES = ["README.md", *sorted(str(file.relative_to(ROOT)) for file in (ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(
    r"(?:^ *<!-- (?P<mark>.+?) -->\n)?^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block and its mark."""

    page: str
    line: int
    language: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def after(self, word: str) -> str | None:
        """The rest of the mark after its first word; None if that is another one."""
        first, _, rest = self.mark.partition(" ")
        return rest if first == word else None


def blocks(page: str) -> list[Block]:
    """All of a page, in order."""
    content = (ROOT / page).read_text()
    found = []
    for match in _BLOCK.finditer(content):
        indent = len(match["indent"])
        text = "".join(line[indent:] if line.strip() else line for line in match["text"].splitlines(keepends=True))
        line = content.count("\n", 0, match.start("language")) + 1
        found.append(Block(page, line, match["language"], match["mark"] or "", text))
    return found


def marked(word: str) -> list[Block]:
    """The blocks of all pages whose mark begins with `word`."""
    return [block for page in PAGES for block in blocks(page) if block.after(word) is not None]
