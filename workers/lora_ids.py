"""Which adapter a caller's `lora_int_id` stands for: one id, one adapter, for the life of the engine."""

from __future__ import annotations

from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.errors import AdapterConflictError
from lorafleet.workers.params import LoRARequest


class LoRAIds:
    """Registers adapters with the engine when they are first named."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._by_id: dict[int, tuple[LoRARequest, str]] = {}

    def digest(self, request: LoRARequest | None) -> str | None:
        """The digest to generate with; None is the base model. Reads the adapter's file at the first call.

        Raises `AdapterConflictError` when the id stands for another adapter, `AdapterRefusedError`.
        """
        if request is None:
            return None
        known = self._by_id.get(request.lora_int_id)
        if known is None:
            known = request, self._engine.register_adapter(request.lora_path).digest
            self._by_id[request.lora_int_id] = known
        elif known[0] != request:
            raise AdapterConflictError(
                f"lora_int_id {request.lora_int_id} stands for {known[0].lora_name!r} ({known[0].lora_path}), not for "
                f"{request.lora_name!r} ({request.lora_path}). Give each adapter an id of its own."
            )
        return known[1]
