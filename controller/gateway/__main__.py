"""``lorafleet gateway``, or ``python -m lorafleet.controller.gateway``: flags to a running gateway.

Owns: the flags. Leaves to others: their checks (config.py), running (server.py).
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lorafleet.controller.command_parser import CommandParser
from lorafleet.controller.gateway.api_keys import WEAK_KEY_CHARS, add_key_flags, given_keys, num_weak
from lorafleet.controller.gateway.config import GatewayConfig, SessionTimes
from lorafleet.controller.gateway.limits import Limits, flag_of
from lorafleet.controller.gateway.server import serve
from lorafleet.controller.gateway.tenants import read_tenants
from lorafleet.workers.errors import ConfigError
from lorafleet.workers.switch_interval import shorten_switch_interval


def parse(argv: Sequence[str] | None) -> tuple[GatewayConfig, argparse.Namespace]:
    """Raises ConfigError for a value that cannot be; argparse itself exits for unknown flags."""
    defaults = GatewayConfig(controller="localhost:1", token="-")
    parser = CommandParser(
        prog="lorafleet gateway",
        description="LoRAFleet's HTTP gateway: an OpenAI-compatible API in front of the workers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--controller", required=True, metavar="HOST:PORT", help="the controller's gRPC address")
    parser.add_argument("--token-file", required=True, type=Path, metavar="FILE", help="holds the fleet's token")
    parser.add_argument("--host", default=defaults.host, help="address to listen on")
    parser.add_argument("--port", type=int, default=defaults.port, help="0 takes any free one")
    add_key_flags(parser)
    parser.add_argument(
        "--tenants", type=Path, metavar="FILE", help="JSON: tenants with names, api_keys, weights and priorities"
    )
    parser.add_argument("--seed", type=int, help="of the seeds drawn for requests that give none")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    parser.add_argument(
        "--exit-with-parent",
        action="store_true",
        help="stdin and stdout are pipes held by the parent: drain when the one closes, write a line a second to the "
        "other",
    )
    parser.add_argument(
        "--vllm-metrics-compat",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also export metrics under vLLM's names",
    )
    parser.add_argument(
        "--reuse-port",
        action="store_true",
        help="let several gateway processes listen on one port, each from when it can serve",
    )
    for name, help_text in (
        ("drain_timeout_s", "seconds that running requests get at shutdown"),
        ("worker_wait_s", "seconds that a request waits while no worker can take it or go on with it"),
        ("num_tokenizer_threads", "threads for JSON, chat templates and tokenizers; one is kept for short requests"),
    ):
        default = getattr(defaults, name)
        parser.add_argument(flag_of(name), type=type(default), default=default, help=help_text)
    Limits.add_flags(parser)
    parser.add_argument(
        "--slow-step-s",
        type=float,
        default=defaults.times.slow_step_s,
        help="age of an engine step at which its worker gets nothing new while others can take it",
    )
    args = parser.parse_args(argv)
    try:
        token = args.token_file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {args.token_file} cannot be read: {error}.") from error
    api_keys, admin_api_keys = given_keys(args)
    config = GatewayConfig(
        controller=args.controller,
        token=token,
        host=args.host,
        port=args.port,
        api_keys=api_keys,
        admin_api_keys=admin_api_keys,
        tenants=read_tenants(args.tenants) if args.tenants else {},
        seed=args.seed,
        drain_timeout_s=args.drain_timeout_s,
        worker_wait_s=args.worker_wait_s,
        limits=Limits.of_flags(args),
        times=SessionTimes(slow_step_s=args.slow_step_s),
        num_tokenizer_threads=args.num_tokenizer_threads,
        vllm_metrics=args.vllm_metrics_compat,
        reuse_port=args.reuse_port,
    )
    return config, args


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 after a drain, 1 if the port cannot be had, 2 for a bad flag."""
    try:
        config, args = parse(argv)
    except ConfigError as error:
        print(f"lorafleet gateway: {error.message}", file=sys.stderr)
        return 2
    logging.basicConfig(
        level=args.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s gateway %(message)s"
    )
    if num := num_weak([*config.api_keys, *config.tenants, *config.admin_api_keys]):
        logging.warning("%d API keys have fewer than %d characters and may be guessed", num, WEAK_KEY_CHARS)
    shorten_switch_interval()
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # a lost connection is told once, by us
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the threads are ours (text_threads.py)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(serve(config, exit_with_parent=args.exit_with_parent))
    except OSError as error:
        print(f"lorafleet gateway: cannot listen on {config.host}:{config.port}: {error}", file=sys.stderr)
        return 1
    return 0


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    """uvloop where there is one: it halves the cost of a token."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.Loop


if __name__ == "__main__":
    sys.exit(main())
