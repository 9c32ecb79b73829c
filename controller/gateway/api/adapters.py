"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, in vLLM's shapes.

Owns: the two endpoints; an answer means that this gateway's next request sees the change. Leaves to others: the change
itself (the controller's adapters.py).
"""

from __future__ import annotations

from typing import Final

from aiohttp import web

from lorafleet.controller.gateway.api.door import Call, takes
from lorafleet.controller.gateway.api.schema import LoadAdapterBody, UnloadAdapterBody
from lorafleet.proto import controller_pb2
from lorafleet.workers.errors import InvalidRequestError, quoted
from lorafleet.workers.scheduling.request import MAX_NAME_CHARS

LOAD_S: Final = 600.0  # an adapter may have to be downloaded
UNLOAD_S: Final = 90.0  # earlier changes and the end of its requests
MAX_PATH_CHARS: Final = 4096  # Linux's


def _check_name(fields: LoadAdapterBody | UnloadAdapterBody) -> None:
    name = fields.lora_name
    if len(name) > MAX_NAME_CHARS:
        raise InvalidRequestError(
            f"lora_name has {len(name)} characters; the limit is {MAX_NAME_CHARS}.", param="lora_name"
        )


def _check_load(fields: LoadAdapterBody) -> None:
    _check_name(fields)
    path = fields.lora_path
    if len(path) > MAX_PATH_CHARS or "\0" in path:
        raise InvalidRequestError(
            f"lora_path is {quoted(path)}; it must be at most {MAX_PATH_CHARS} characters without a null character: a "
            "directory on the workers or a hub id.",
            param="lora_path",
        )


@takes(LoadAdapterBody, _check_load, admin=True)
async def load_adapter(call: Call[LoadAdapterBody]) -> web.Response:
    """Load an adapter on every worker under `lora_name`."""
    fields = call.fields
    update = controller_pb2.LoadAdapterRequest(
        name=fields.lora_name,
        root=fields.lora_path,
        load_inplace=fields.load_inplace,
        weight=1.0 if fields.weight is None else fields.weight,
        pin=fields.pin,
    )
    await call.state.routes.update("LoadAdapter", update, LOAD_S)
    return web.Response(text=f"Success: LoRA adapter '{fields.lora_name}' added successfully.")


@takes(UnloadAdapterBody, _check_name, admin=True)
async def unload_adapter(call: Call[UnloadAdapterBody]) -> web.Response:
    """Unload `lora_name`; its running requests finish. The headers give the memory that is free now."""
    name = call.fields.lora_name
    update = controller_pb2.UnloadAdapterRequest(name=name)
    done = await call.state.routes.update("UnloadAdapter", update, UNLOAD_S)
    headers = {
        "x-lorafleet-freed-device-bytes": str(done.device_bytes),
        "x-lorafleet-freed-host-bytes": str(done.host_bytes),
        "x-lorafleet-draining-workers": str(done.num_draining),
    }
    return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.", headers=headers)
