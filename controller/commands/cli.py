"""The command line: `lorafleet serve`, `demo`, `up`, `down`, `restart`, `drain`, `status` and `gateway`.

Owns: which command does what. Imports neither Ray nor torch until there is something to run, so that `--help` and a
mistyped flag answer at once. Leaves to others: the flags of a fleet (flags.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from lorafleet.controller.arguments.parser import CommandParser
from lorafleet.controller.commands.flags import (
    add_fleet_flags,
    drain_timeout,
    port,
    resolved,
    serve_config,
    with_flags_file,
)
from lorafleet.controller.config import GATEWAY_NODES
from lorafleet.controller.gateway.api_keys import API_KEY_VARIABLE, keys_of_variable
from lorafleet.workers.errors import ConfigError, LoRAFleetError


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command; the exit code is 0, 1 for what cannot run, 2 for wrong usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["gateway"]:
        from lorafleet.controller.gateway.__main__ import main as gateway

        sys.exit(gateway(argv[1:]))
    parser = make_parser()
    try:
        if argv[:1] == ["demo"]:
            argv = _demo(parser, argv[1:])
        args = parser.parse_args(with_flags_file(argv))
        if args.command in ("serve", "up"):
            config = serve_config(args)
            if args.command == "up":
                _check_gateway_flags(args)
    except ConfigError as error:
        parser.command(argv[0]).error(error.message)
    try:
        if args.command == "serve":
            from lorafleet.controller.commands.serve import serve

            serve(resolved(config))
        elif args.command == "up":
            from lorafleet.controller.commands.up import up

            up(
                resolved(config),
                controller_port=args.controller_port,
                token_file=args.token_file.expanduser(),
                gateways_on=args.gateways,
                follow=args.follow,
            )
        elif args.command == "status":
            _status(args)
        else:
            from lorafleet.controller.commands import up as commands

            if args.command == "restart":
                commands.restart(args.ray_address)
            elif args.command == "drain":
                commands.drain(args.ray_address, args.drain_timeout_s)
            else:
                commands.down(args.ray_address, args.drain_timeout_s)
    except LoRAFleetError as error:
        sys.exit(f"lorafleet: error: {error.message}")
    except KeyboardInterrupt:  # before there was anything to drain
        sys.exit(130)
    sys.exit(0)


def make_parser() -> CommandParser:
    parser = CommandParser(prog="lorafleet", description="Serve one base model and any number of LoRA adapters.")
    parser.add_argument("--version", action="version", version=f"lorafleet {version('lorafleet')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="serve a model over an OpenAI-compatible API",
        description="Serve a model and its adapters over an OpenAI-compatible HTTP API, on a Ray of its own on this "
        "machine or on a running Ray cluster. Flags that vLLM has mean what they mean there. Flags may also stand in a "
        "file: `lorafleet serve @FILE`, several on a line, # for comments.",
    )
    add_fleet_flags(serve, ray_address=None, ray_help="a running Ray cluster to use (default: a Ray of its own)")
    commands.add_parser(
        "demo", help="serve a small model with three adapters; takes the flags of `serve`", add_help=False
    )
    _add_up(commands)
    for name, purpose, description in (
        ("down", "end the fleet on a Ray cluster", "gateways finish their requests first."),
        (
            "restart",
            "restart the workers of a fleet on a Ray cluster",
            "one after the other, each when its requests have ended; no request is lost.",
        ),
        (
            "drain",
            "make a node of a Ray cluster ready to be taken away",
            "workers with a rank on this node, and its gateways, take no more requests and finish theirs. `lorafleet "
            "restart` has them back.",
        ),
    ):
        command = commands.add_parser(name, help=purpose, description=f"{purpose.capitalize()}: {description}")
        command.add_argument(
            "--ray-address", metavar="ADDRESS", default="auto", help="of the cluster (default: the one of this machine)"
        )
        if name != "restart":
            command.add_argument(
                "--drain-timeout-s",
                type=drain_timeout,
                default=30.0,
                help="seconds that running requests get (default: %(default)s)",
            )
    commands.add_parser(
        "gateway", help="run one more gateway of a fleet, on any machine; `lorafleet gateway --help`", add_help=False
    )
    status = commands.add_parser(
        "status",
        help="show the workers of a running fleet",
        description="Show the workers of a running fleet: state, ranks, generation, load, KV use and adapters by tier.",
    )
    status.add_argument("--url", default="http://127.0.0.1:8000", help="of a gateway (default: %(default)s)")
    status.add_argument("--api-key", metavar="KEY", help="one that it knows (default: $LORAFLEET_API_KEY)")
    status.add_argument("--json", action="store_true", help="print what the gateway says, for programs")
    return parser


def _add_up(commands: argparse._SubParsersAction[CommandParser]) -> None:
    up = commands.add_parser(
        "up",
        help="start a fleet on a running Ray cluster and leave it running",
        description="Start a fleet on a running Ray cluster and leave it running: the controller on the head node, the "
        "workers where they fit, gateways where --gateways says. The same command again waits for the fleet that runs. "
        "Flags may also stand in a file: `lorafleet up @FILE`, several on a line, # for comments.",
    )
    add_fleet_flags(up, ray_address="auto", ray_help="of the cluster (default: the one of this machine)")
    cluster = up.add_argument_group("cluster")
    cluster.add_argument(
        "--gateways",
        choices=GATEWAY_NODES,
        default="head",
        help="nodes that --gateway-processes run on, those that join later too (default: %(default)s); for other "
        "machines than the node itself give --host 0.0.0.0",
    )
    cluster.add_argument(
        "--controller-port", type=port, default=50050, help="of the controller, on the head node (default: %(default)s)"
    )
    cluster.add_argument(
        "--token-file",
        type=Path,
        default=Path("~/.lorafleet/token"),
        metavar="FILE",
        help="what gateways show the controller and the workers; made if it is not there (default: %(default)s)",
    )
    cluster.add_argument(
        "--follow",
        action="store_true",
        help="wait for nodes that have room, stay, and print what happens to the fleet; SIGTERM ends the command, not "
        "the fleet, SIGUSR1 restarts the workers; exit code 1 when the Ray cluster is lost",
    )


def _demo(parser: CommandParser, flags: Sequence[str]) -> list[str]:
    """Return the demo's `serve` command. The model is fetched only for flags that can be served."""
    from lorafleet.controller.commands.demo import demo_model, serve_arguments

    parser.parse_args(with_flags_file(serve_arguments("the demo model", flags)))
    return serve_arguments(demo_model(), flags)


def _check_gateway_flags(args: argparse.Namespace) -> None:
    """Raises `ConfigError` for flags of gateways that nobody would take."""
    given = [
        flag
        for flag, is_given in (
            ("--api-key", args.api_key),
            ("--admin-api-key", args.admin_api_key),
            ("--tenants", args.tenants),
            ("--gateway-processes", args.gateway_processes > 1),
        )
        if is_given
    ]
    if given and args.gateways == "none":
        raise ConfigError(
            f"{given[0]} is given with --gateways none, where it would have no effect. Give it to `lorafleet gateway`."
        )


def _status(args: argparse.Namespace) -> None:
    from lorafleet.controller.commands.status import fetch_fleet, table

    keys = [args.api_key] if args.api_key else keys_of_variable(API_KEY_VARIABLE)
    fleet = fetch_fleet(args.url, keys[0] if keys else None)
    print(json.dumps(fleet, indent=2) if args.json else table(fleet))
