"""The options of a gateway, for each command that starts one: `lorafleet serve`, `up` or `gateway`.

Owns: the options that these commands share, their defaults and checks. A new one is declared here and used where it
matters; it reaches gateway processes by itself (gateway_processes.py). Imports nothing slow.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

from lorafleet.controller.gateway.api_keys import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, check_keys, keys_of_variable
from lorafleet.controller.gateway.cross_origin import CrossOrigin
from lorafleet.controller.gateway.limits import Limits
from lorafleet.workers.answers.reasoning import REASONING_FORMATS
from lorafleet.workers.answers.tool_formats import TOOL_FORMATS
from lorafleet.workers.offline.args import EngineArgs
from lorafleet.workers.options import DAY_S, check_options, nested, option, option_of

HTTP: Final = "HTTP"
LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayOptions:
    """The options of each gateway process of a fleet."""

    host: str = option("127.0.0.1", group=HTTP, metavar="HOST", help="address to listen on")
    port: int = option(8000, group=HTTP, minimum=1, maximum=65535, help="port to listen on")
    api_keys: tuple[str, ...] = option(
        (),
        group=HTTP,
        flag="--api-key",
        metavar="KEY",
        is_secret=True,
        fallback=partial(keys_of_variable, API_KEY_VARIABLE),
        help="keys, one of which a client must send as a bearer token; each is a tenant of its own",
        default_text=f"${API_KEY_VARIABLE}: one, several separated by commas, or a JSON array; else no key is required",
    )
    admin_api_keys: tuple[str, ...] = option(
        (),
        group=HTTP,
        flag="--admin-api-key",
        metavar="KEY",
        is_secret=True,
        fallback=partial(keys_of_variable, ADMIN_KEY_VARIABLE),
        help="keys that may load and unload adapters over HTTP",
        default_text=f"${ADMIN_KEY_VARIABLE} in the same forms; else the first key of --api-key, or of --tenants; "
        "without any keys, everybody may",
    )
    tenants_file: str | None = option(
        None,
        group=HTTP,
        flag="--tenants",
        metavar="FILE",
        help='tenants that share the workers by weight: JSON, [{"name": "acme", "api_keys": ["..."], "weight": 2.0, '
        '"priority": 0}]; weight (default 1) is a share of service, tenants of lower priority (default 0) come first',
        default_text="each API key is a tenant",
    )
    drain_timeout_s: float = option(
        30.0, group=HTTP, minimum=0.0, maximum=DAY_S, help="time that running requests get at shutdown"
    )
    worker_wait_s: float = option(
        60.0,
        group=HTTP,
        minimum=0.0,
        maximum=DAY_S,
        help="maximum time a request waits while no worker can take or resume it; after it, 503",
    )
    seed: int | None = option_of(EngineArgs, "seed", group=HTTP)
    parse_special_in_content: bool = option(
        False,
        group=HTTP,
        help="take the text of a control token in a chat message, such as <|im_end|>, for the token itself; by default "
        "it is text there. Prompts of completions are always taken so",
    )
    log_level: LogLevel = option("warning", group=HTTP, help="least severe messages that are logged")
    access_log: bool = option(
        True, group=HTTP, help="log a line for each answered request, except health checks, metrics and status"
    )
    strict_fields: bool = option(
        False,
        group=HTTP,
        help="refuse requests with fields that this server does not know; otherwise they are ignored, and named in the "
        "answer's header x-lorafleet-ignored-fields",
    )
    cross_origin: CrossOrigin = nested(CrossOrigin)
    enable_auto_tool_choice: bool = option(
        True, group=HTTP, help='let answers call tools when tool_choice is "auto"; always on unless turned off'
    )
    tool_call_parser: str | None = option(
        None,
        group=HTTP,
        choices=tuple(TOOL_FORMATS),
        help="form in which the model writes tool calls",
        default_text="the profile's, else the one that the chat template asks for, else hermes",
    )
    reasoning_parser: str | None = option(
        None,
        group=HTTP,
        choices=tuple(REASONING_FORMATS),
        help="marks of the model's reasoning, which is told apart from the content",
        default_text="the profile's, else reasoning is content",
    )
    limits: Limits = nested(Limits)

    def __post_init__(self) -> None:
        check_options(self)
        check_keys("--api-key", self.api_keys)
        check_keys("--admin-api-key", self.admin_api_keys)
