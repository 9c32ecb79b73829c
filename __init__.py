"""LoRAFleet as a library: ``from lorafleet import LLM, SamplingParams, LoRARequest``.

Lazy: importing this package loads neither torch nor Ray; a name is imported when it is first used.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lorafleet import workers as _library

if TYPE_CHECKING:
    from lorafleet.workers import LLM as LLM
    from lorafleet.workers import AsyncLLM as AsyncLLM
    from lorafleet.workers import CompletionOutput as CompletionOutput
    from lorafleet.workers import EngineArgs as EngineArgs
    from lorafleet.workers import LLMEngine as LLMEngine
    from lorafleet.workers import LoRARequest as LoRARequest
    from lorafleet.workers import RequestOutput as RequestOutput
    from lorafleet.workers import SamplingParams as SamplingParams

__all__ = [*_library.__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("lorafleet")
    if name in _library.__all__:
        return getattr(_library, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
