"""`lorafleet gateway` as a command: its options, apart from the process, which takes longer to import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorafleet.controller.arguments.flags import Command
from lorafleet.controller.gateway.config import FLEET, GatewayConfig
from lorafleet.workers.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessOptions:
    """Options of the process, apart from the gateway's configuration."""

    token_file: Path = option(group=FLEET, is_required=True, metavar="FILE", help="holds the fleet's token")
    exit_with_parent: bool = option(
        False,
        group=FLEET,
        help="stdin and stdout are pipes held by the parent: drain when stdin closes, write a line a second to stdout",
    )


GATEWAY = Command(
    "gateway",
    "run one more gateway of a fleet, on any machine",
    (GatewayConfig, ProcessOptions),
    "LoRAFleet's HTTP gateway: an OpenAI-compatible API in front of the workers.",
)
