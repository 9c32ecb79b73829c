"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, in vLLM's shapes.

Owns: the two endpoints; an answer means that this gateway's next request sees the change. Leaves to others: doing it
(the controller's adapters.py).
"""

from __future__ import annotations

from typing import Final

from aiohttp import web

from lorafleet.controller.gateway.api.auth import TENANT, check_admin
from lorafleet.controller.gateway.api.schema import LoadAdapterBody, UnloadAdapterBody, decode
from lorafleet.controller.gateway.api.state import STATE
from lorafleet.proto import controller_pb2
from lorafleet.workers.errors import InvalidRequestError, quoted
from lorafleet.workers.scheduling.request import MAX_NAME_CHARS

LOAD_S: Final = 600.0  # an adapter may have to be downloaded
UNLOAD_S: Final = 90.0  # its turn and the end of its requests
MAX_PATH_CHARS: Final = 4096  # Linux's


async def load_adapter(request: web.Request) -> web.Response:
    """Load an adapter on every worker under `lora_name`."""
    check_admin(request)
    state = request.app[STATE]
    with state.intake.enter(request) as place:
        body = await place.read_body()
        fields = await state.parse(request[TENANT], len(body), lambda: decode(body, LoadAdapterBody))
        _check_name(fields.lora_name)
        _check_path(fields.lora_path)
        update = controller_pb2.LoadAdapterRequest(
            name=fields.lora_name,
            root=fields.lora_path,
            load_inplace=fields.load_inplace,
            weight=1.0 if fields.weight is None else fields.weight,
            pin=fields.pin,
        )
        await state.routes.update("LoadAdapter", update, LOAD_S)
    return web.Response(text=f"Success: LoRA adapter '{fields.lora_name}' added successfully.")


async def unload_adapter(request: web.Request) -> web.Response:
    """Take `lora_name` away; its running requests end as they would have. The headers say what memory is free now."""
    check_admin(request)
    state = request.app[STATE]
    with state.intake.enter(request) as place:
        body = await place.read_body()
        fields = await state.parse(request[TENANT], len(body), lambda: decode(body, UnloadAdapterBody))
        _check_name(fields.lora_name)
        update = controller_pb2.UnloadAdapterRequest(name=fields.lora_name)
        done = await state.routes.update("UnloadAdapter", update, UNLOAD_S)
    headers = {
        "x-lorafleet-freed-device-bytes": str(done.device_bytes),
        "x-lorafleet-freed-host-bytes": str(done.host_bytes),
        "x-lorafleet-draining-workers": str(done.num_draining),
    }
    return web.Response(text=f"Success: LoRA adapter '{fields.lora_name}' removed successfully.", headers=headers)


def _check_name(name: str) -> None:
    if len(name) > MAX_NAME_CHARS:
        raise InvalidRequestError(
            f"lora_name has {len(name)} characters; the limit is {MAX_NAME_CHARS}.", param="lora_name"
        )


def _check_path(path: str) -> None:
    if len(path) > MAX_PATH_CHARS or "\0" in path:
        raise InvalidRequestError(
            f"lora_path is {quoted(path)}; it must be at most {MAX_PATH_CHARS} characters without a null character: a "
            "directory on the workers or a hub id.",
            param="lora_path",
        )
