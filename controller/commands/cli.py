"""The command line: `lorafleet serve`, `demo`, `up`, `down`, `restart`, `drain`, `status` and `gateway`.

Owns: which command does what. Imports neither Ray nor torch until there is something to run, so that `--help` and a
mistyped flag answer at once. Leaves to others: which options a command takes (command_table.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

from lorafleet.controller.arguments.flags import made
from lorafleet.controller.arguments.parser import CommandParser
from lorafleet.controller.commands.command_table import make_parser
from lorafleet.controller.commands.flags import resolved, serve_config, with_flags_file
from lorafleet.controller.config import ClusterOptions, ServeConfig, StatusOptions, StopOptions, UpOptions
from lorafleet.workers.errors import ConfigError, LoRAFleetError


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command. Exit code 0: success; 1: it cannot run; 2: wrong usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["gateway"]:
        from lorafleet.controller.gateway.__main__ import main as gateway

        sys.exit(gateway(argv[1:]))
    parser = make_parser()
    try:
        if argv[:1] == ["demo"] and not {"-h", "--help"}.intersection(argv):
            argv = _demo(parser, argv[1:])
        run = _told(parser.parse_args(with_flags_file(argv)))
    except ConfigError as error:
        parser.command(argv[0]).error(error.message)
    try:
        run()
    except LoRAFleetError as error:
        sys.exit(f"lorafleet: error: {error.message}")
    except KeyboardInterrupt:  # nothing to drain yet
        sys.exit(130)
    sys.exit(0)


def _told(args: argparse.Namespace) -> Callable[[], None]:
    """Check the command's options and return the call that runs it. Raises `ConfigError`."""
    match args.command:
        case "serve":
            return partial(_serve, serve_config(args))
        case "up":
            _check_gateway_flags(args)
            return partial(_up, serve_config(args), made(UpOptions, args))
        case "down":
            return partial(_down, made(StopOptions, args))
        case "restart":
            return partial(_restart, made(ClusterOptions, args))
        case "drain":
            return partial(_drain, made(StopOptions, args))
        case _:
            return partial(_status, made(StatusOptions, args))


def _serve(config: ServeConfig) -> None:
    config = resolved(config, is_own_ray=config.ray_address is None)
    from lorafleet.controller.commands.serve import serve

    serve(config)


def _up(config: ServeConfig, cluster: UpOptions) -> None:
    config = resolved(config, is_own_ray=False)
    from lorafleet.controller.commands.up import up

    up(config, cluster)


def _down(options: StopOptions) -> None:
    from lorafleet.controller.commands.up import down

    down(options.ray_address, options.drain_timeout_s)


def _restart(options: ClusterOptions) -> None:
    from lorafleet.controller.commands.up import restart

    restart(options.ray_address)


def _drain(options: StopOptions) -> None:
    from lorafleet.controller.commands.up import drain

    drain(options.ray_address, options.drain_timeout_s)


def _status(options: StatusOptions) -> None:
    from lorafleet.controller.commands.status import fetch_fleet, table, watch

    def show() -> str:
        fleet = fetch_fleet(options.url, options.api_key)
        return json.dumps(fleet, indent=2) if options.json else table(fleet)

    if options.watch:
        watch(show, sys.stdout)
    else:
        print(show())


def _demo(parser: CommandParser, flags: Sequence[str]) -> list[str]:
    """Return the demo's `serve` command. The flags are checked before the model is fetched."""
    from lorafleet.controller.commands.demo import demo_model, serve_arguments

    parser.parse_args(with_flags_file(serve_arguments("the demo model", flags)))
    return serve_arguments(demo_model(), flags)


def _check_gateway_flags(args: argparse.Namespace) -> None:
    """Raises `ConfigError` for gateway flags if the command starts no gateways."""
    flags = {"--api-key": args.api_keys, "--admin-api-key": args.admin_api_keys, "--tenants": args.tenants_file}
    given = [flag for flag, value in flags.items() if value]
    if (args.gateway_processes or 1) > 1:
        given.append("--gateway-processes")
    if given and args.gateways == "none":
        raise ConfigError(
            f"{given[0]} is given with --gateways none, where it would have no effect. Give it to `lorafleet gateway`."
        )
