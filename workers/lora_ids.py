"""Which adapter a caller's `lora_int_id` stands for: one id, one adapter, until it is removed or loaded in place."""

from __future__ import annotations

from concurrent.futures import Future

from lorafleet.workers.adapters.aliases import Aliases
from lorafleet.workers.adapters.format import AdapterSpec
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.engine.registered import FreedBytes
from lorafleet.workers.errors import AdapterConflictError
from lorafleet.workers.params import LoRARequest


class LoRAIds:
    """Registers adapters with the engine when they are first named. One owner calls it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._aliases: Aliases[int] = Aliases(engine)
        self._requests: dict[int, LoRARequest] = {}

    def known(self) -> set[int]:
        return set(self._requests)

    def spec(self, request: LoRARequest) -> AdapterSpec:
        """What the id stands for. Reads the adapter's file at the first call.

        Raises `AdapterConflictError` when the id stands for another adapter, `AdapterRefusedError`.
        """
        known = self._requests.get(request.lora_int_id)
        if known is None:
            return self._load(request)
        if (known.lora_name, known.lora_path) != (request.lora_name, request.lora_path):
            if request.load_inplace:
                return self._load(request)
            raise AdapterConflictError(
                f"lora_int_id {request.lora_int_id} stands for {known.lora_name!r} ({known.lora_path}), not for "
                f"{request.lora_name!r} ({request.lora_path}). Give each adapter an id of its own, or set load_inplace."
            )
        spec = self._aliases.get(request.lora_int_id)
        assert spec is not None
        return spec

    def add(self, request: LoRARequest) -> bool:
        """Bring what the id stands for into the host cache; with load_inplace, anew. Raises what `spec` raises."""
        spec = self._load(request) if request.load_inplace else self.spec(request)
        self._engine.prefetch_adapter(spec.digest)
        return True

    def pin(self, lora_int_id: int) -> bool:
        """Keep what the id stands for in a slot until it is removed. False: it stands for nothing. For any thread.

        Raises `AdapterConflictError` when all slots but one are taken so.
        """
        spec = self._aliases.get(lora_int_id)
        if spec is not None:
            self._engine.pin_adapter(spec.digest)
        return spec is not None

    def remove(self, lora_int_id: int) -> Future[FreedBytes] | None:
        """Give an id back; see `Aliases.remove`. Raises `UnknownModelError`."""
        self._requests.pop(lora_int_id, None)
        return self._aliases.remove(lora_int_id).result()

    def close(self) -> None:
        self._aliases.close()

    def _load(self, request: LoRARequest) -> AdapterSpec:
        """Read the adapter's file now; the id stands for that from now on. Raises `AdapterRefusedError`."""
        spec = self._aliases.add(request.lora_int_id, request.lora_path).result()
        self._requests[request.lora_int_id] = request
        return spec
