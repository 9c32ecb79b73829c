"""`lorafleet status`: the workers and models of a running fleet, as tables or as the gateway's JSON.

Owns: the request to a gateway, and the tables. Leaves to others: the gateway's answer (gateway/api/fleet.py).
"""

from __future__ import annotations

import datetime
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from lorafleet.workers.errors import LoRAFleetError, WorkerUnavailableError

_TIMEOUT_S = 10.0
_CLEAR = "\x1b[H\x1b[2J"  # ANSI: to the top left, erase all
WATCH_S = 2.0
_MODEL_COLUMNS = ("MODEL", "TIER", "REQUESTS", "TOKENS/S", "TOKENS")
_COLUMNS = ("WORKER", "STATE", "RANKS", "GENERATION", "STARTS", "RUNNING", "WAITING", "KV", "DEVICE", "HOST", "DISK")


def fetch_fleet(url: str, api_key: str | None) -> dict[str, Any]:
    """Return the answer of GET /fleet. Raises `LoRAFleetError`, which says what to do."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no $http_proxy: the gateway is our own
    try:
        request = urllib.request.Request(_fleet_url(url))
        if api_key:
            request.add_header("Authorization", f"Bearer {api_key}")
        with opener.open(request, timeout=_TIMEOUT_S) as response:
            fleet = json.load(response)
    except urllib.error.HTTPError as error:
        raise LoRAFleetError(f"{url} answers {error.code}: {_message(error)}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise WorkerUnavailableError(
            f"No gateway answers at {url} ({getattr(error, 'reason', error)}). Give --url the address that `lorafleet "
            "serve` printed."
        ) from error
    if not isinstance(fleet, dict) or fleet.get("object") != "fleet":
        raise LoRAFleetError(f"{url} is not a LoRAFleet gateway.")
    return fleet


def _fleet_url(url: str) -> str:
    """Return the URL of /fleet for a gateway's address with or without scheme, /v1 or trailing slashes."""
    base = url if "://" in url else f"http://{url}"
    return base.rstrip("/").removesuffix("/fleet").removesuffix("/v1").rstrip("/") + "/fleet"


def table(fleet: dict[str, Any]) -> str:
    """Return the fleet as tables. KV: share of KV pages in use. DEVICE, HOST, DISK: adapters by fastest tier."""
    lines = _aligned([_COLUMNS, *(_row(worker) for worker in fleet["workers"])])
    for worker in fleet["workers"]:
        lines += [f"{worker['name']} lacks {lacking['name']} ({lacking['reason']})" for lacking in worker["lacking"]]
        if worker["num_lacking"] > len(worker["lacking"]):
            lines.append(f"{worker['name']} lacks {worker['num_lacking'] - len(worker['lacking'])} more")
    lines += ["", *_aligned([_MODEL_COLUMNS, *(_model_row(model) for model in fleet["models"])])]
    num_named = sum(len(model["names"]) for model in fleet["models"] if model["tier"] is not None)
    shown = f" (the busiest {num_named} are shown)" if num_named < fleet["num_adapters"] else ""
    return "\n".join(
        [*lines, f"{fleet['num_adapters']} adapters{shown}, routing table version {fleet['table_version']}"]
    )


def watch(show: Callable[[], str], out: TextIO, sleep: Callable[[float], None] = time.sleep) -> None:
    """Show again and again, in place on a terminal, until Ctrl-C.

    A gateway that has answered once may be away for a while; at first, its error is raised.
    """
    try:
        text = show()
        while True:
            print(f"{_CLEAR if out.isatty() else ''}{text}", file=out, flush=True)
            sleep(WATCH_S)
            try:
                text = show()
            except LoRAFleetError as error:
                text = error.message
    except KeyboardInterrupt:
        return


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _model_row(model: dict[str, Any]) -> tuple[str, ...]:
    tier = model["tier"] or "-"
    return (
        ", ".join(model["names"]),
        f"{tier} x{model['workers']}" if (model["workers"] or 0) > 1 else tier,
        str(model["requests"]),
        f"{model['output_tokens_per_s']:.1f}",
        str(model["output_tokens"]),
    )


def _row(worker: dict[str, Any]) -> tuple[str, ...]:
    row = (worker["name"], worker["state"], str(worker["ranks"]))
    if worker["load"] is None:
        return (*row, "-", str(worker["starts"]), *"------")
    load, adapters = worker["load"], worker["adapters"]
    return (
        *row,
        # A generation is the time of the process's start in nanoseconds.
        datetime.datetime.fromtimestamp(worker["generation"] / 1e9).strftime("%Y-%m-%d %H:%M:%S"),
        str(worker["starts"]),
        f"{load['running']}/{load['max_num_seqs']}",
        str(load["waiting"]),
        f"{worker['kv_usage']:.0%}",
        f"{adapters['device']}/{adapters['max_loras']}",
        str(adapters["host"]),
        str(adapters["disk"]),
    )


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (OSError, ValueError, LookupError, TypeError):
        return error.reason
