"""The reference of the command line, docs/reference/cli.md, from the options' declarations: `make docs-cli` writes it.

python -m lorafleet.controller.commands.reference > docs/reference/cli.md
"""

from __future__ import annotations

from lorafleet.controller.arguments.flags import Command, bounds_text, default_text, metavar
from lorafleet.controller.commands.command_table import COMMANDS
from lorafleet.workers.options import Declared

_HEAD = """# Command line

<!-- Written by `make docs-cli` from the options' declarations; a change by hand is lost. -->

`lorafleet COMMAND --help` prints the same. Several values follow each other, or the flag is given again. `SIZE` is a
number of bytes, or a number with a unit such as `2GiB` or `500MB`. The options of an engine and of LoRA are keyword
arguments of `LLM` and `EngineArgs` too, with underscores: `--max-loras 4` is `max_loras=4`. But for `--max-waiting`.
"""


def reference() -> str:
    """Return the page: a section for each command, a table for each group of its options."""
    return "\n".join([_HEAD, *(_section(command) for command in COMMANDS)])


def _section(command: Command) -> str:
    """Return a command's section. If it has all options of another command, only the additional ones are listed."""
    base = next((other for other in COMMANDS if other.owners and set(other.owners) < set(command.owners)), None)
    known = [option for options in base.groups.values() for option in options] if base else []
    positional = "".join(f" {option.flag}" for option in command.groups.get("", ()) if option.says.is_positional)
    lines = [f"## lorafleet {command.name}{positional}", "", _escaped(command.description), ""]
    if base:
        lines += [f"It has the options of [lorafleet {base.name}](#lorafleet-{base.name}-model), and these:", ""]
    for title, options in command.groups.items():
        if own := [option for option in options if option not in known]:
            lines += [f"### {command.name}: {title}", ""] if title else []
            lines += ["| Option | Default | Values | Meaning |", "|---|---|---|---|", *map(_row, own), ""]
    return "\n".join(lines)


def _row(option: Declared) -> str:
    default = "required" if option.says.is_required else default_text(option)
    values = ", ".join(f"`{choice}`" for choice in option.says.choices) or bounds_text(option)
    return f"| `{_usage(option)}` | {_escaped(default)} | {_escaped(values)} | {_escaped(option.says.help)} |"


def _usage(option: Declared) -> str:
    if option.says.is_positional:
        return option.flag
    if option.kind is bool:
        return f"{option.flag}`, `--no-{option.flag.removeprefix('--')}" if option.default else option.flag
    value = metavar(option) or ("VALUE" if option.kind is str else "N")
    return f"{option.flag} {value} ..." if option.takes_several else f"{option.flag} {value}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(reference(), end="")
