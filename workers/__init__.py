"""Public imports of the library: ``from lorafleet.workers import LLM, SamplingParams, LoRARequest``.

Lazy: importing this package loads neither torch nor Ray. A name is imported at its first use.

Tested elsewhere: errors in controller/gateway/api/test_bad_input.py; host_memory in model/test_device.py; rpc in
server/test_service.py; switch_interval in server/test_actor.py.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorafleet.workers.grammars.structured_outputs import StructuredOutputsParams as StructuredOutputsParams
    from lorafleet.workers.offline.args import EngineArgs as EngineArgs
    from lorafleet.workers.offline.async_llm import AsyncLLM as AsyncLLM
    from lorafleet.workers.offline.beam_search import BeamSearchOutput as BeamSearchOutput
    from lorafleet.workers.offline.beam_search import BeamSearchSequence as BeamSearchSequence
    from lorafleet.workers.offline.llm import LLM as LLM
    from lorafleet.workers.offline.llm_engine import LLMEngine as LLMEngine
    from lorafleet.workers.offline.outputs import CompletionOutput as CompletionOutput
    from lorafleet.workers.offline.outputs import RequestOutput as RequestOutput
    from lorafleet.workers.params import LoRARequest as LoRARequest
    from lorafleet.workers.params import SamplingParams as SamplingParams
    from lorafleet.workers.scheduling.beam_search import BeamSearchParams as BeamSearchParams

_HOME = {
    "AsyncLLM": "lorafleet.workers.offline.async_llm",
    "BeamSearchOutput": "lorafleet.workers.offline.beam_search",
    "BeamSearchParams": "lorafleet.workers.scheduling.beam_search",
    "BeamSearchSequence": "lorafleet.workers.offline.beam_search",
    "CompletionOutput": "lorafleet.workers.offline.outputs",
    "EngineArgs": "lorafleet.workers.offline.args",
    "LLM": "lorafleet.workers.offline.llm",
    "LLMEngine": "lorafleet.workers.offline.llm_engine",
    "LoRARequest": "lorafleet.workers.params",
    "RequestOutput": "lorafleet.workers.offline.outputs",
    "SamplingParams": "lorafleet.workers.params",
    "StructuredOutputsParams": "lorafleet.workers.grammars.structured_outputs",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
