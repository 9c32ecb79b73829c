"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, in vLLM's shapes.

Owns: the two endpoints; an answer means that this gateway's next request sees the change. Leaves to others: doing it
(the controller's adapters.py).
"""

from __future__ import annotations

from typing import Final

from aiohttp import web

from lorafleet.controller.gateway.limits import read_body
from lorafleet.controller.gateway.schema import LoadAdapterBody, UnloadAdapterBody, decode
from lorafleet.controller.gateway.state import STATE
from lorafleet.proto import controller_pb2

LOAD_S: Final = 600.0  # an adapter may have to be downloaded
UNLOAD_S: Final = 90.0  # its turn and the end of its requests


async def load_adapter(request: web.Request) -> web.Response:
    """Load an adapter on every worker under `lora_name`."""
    state = request.app[STATE]
    config = state.config
    with state.admission.enter():
        body = await read_body(request, max_bytes=config.max_body_bytes, timeout_s=config.body_timeout_s)
        fields = decode(body, LoadAdapterBody)
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
    state = request.app[STATE]
    config = state.config
    with state.admission.enter():
        body = await read_body(request, max_bytes=config.max_body_bytes, timeout_s=config.body_timeout_s)
        fields = decode(body, UnloadAdapterBody)
        update = controller_pb2.UnloadAdapterRequest(name=fields.lora_name)
        done = await state.routes.update("UnloadAdapter", update, UNLOAD_S)
    headers = {
        "x-lorafleet-freed-device-bytes": str(done.device_bytes),
        "x-lorafleet-freed-host-bytes": str(done.host_bytes),
        "x-lorafleet-draining-workers": str(done.num_draining),
    }
    return web.Response(text=f"Success: LoRA adapter '{fields.lora_name}' removed successfully.", headers=headers)
