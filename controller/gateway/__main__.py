"""``lorafleet gateway``, or ``python -m lorafleet.controller.gateway``: starts a gateway from its flags.

Owns: the process. Leaves to others: its options (command.py), their checks (config.py), running (server.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lorafleet.controller.arguments.flags import made, values_of
from lorafleet.controller.arguments.parser import CommandParser
from lorafleet.controller.gateway.api_keys import WEAK_KEY_CHARS, num_weak
from lorafleet.controller.gateway.command import GATEWAY, ProcessOptions
from lorafleet.controller.gateway.config import GatewayConfig
from lorafleet.controller.gateway.server import serve
from lorafleet.controller.gateway.tenants import read_tenants
from lorafleet.workers.errors import ConfigError, cut
from lorafleet.workers.switch_interval import shorten_switch_interval


def parse(argv: Sequence[str] | None) -> tuple[GatewayConfig, ProcessOptions]:
    """Return the configuration. Raises ConfigError for an invalid value; argparse itself exits for unknown flags."""
    parser = CommandParser(prog=f"lorafleet {GATEWAY.name}", description=GATEWAY.description)
    GATEWAY.add_flags(parser)
    args = parser.parse_args(argv)
    process = made(ProcessOptions, args)
    try:
        token = process.token_file.read_text().strip()
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise ConfigError(f"--token-file {process.token_file} cannot be read: {error}.") from error
    given = values_of(GatewayConfig, args)
    if tenants_file := given.get("tenants_file"):
        given["tenants"] = read_tenants(Path(tenants_file))
    return GatewayConfig(token=token, **given), process


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 after a drain, 1 if the port is not available, 2 for a bad flag."""
    try:
        config, process = parse(argv)
    except ConfigError as error:
        print(f"lorafleet gateway: {error.message}", file=sys.stderr)
        return 2
    logging.basicConfig(
        level=config.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s gateway %(message)s"
    )
    if num := num_weak([*config.api_keys, *config.tenants, *config.admin_api_keys]):
        logging.warning("%d API keys have fewer than %d characters and may be guessed", num, WEAK_KEY_CHARS)
    shorten_switch_interval()
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # a lost connection is logged once, by us
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the threads are ours (streams/text_threads.py)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(serve(config, exit_with_parent=process.exit_with_parent))
    except OSError as error:
        print(f"lorafleet gateway: cannot listen on {cut(config.host)}:{config.port}: {error}", file=sys.stderr)
        return 1
    return 0


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    """Return uvloop's factory where it is installed: it halves the cost of a token."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.Loop


if __name__ == "__main__":
    sys.exit(main())
