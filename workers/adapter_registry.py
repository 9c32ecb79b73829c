"""The adapters of one worker by (name, version), as the controller asked for them.

Owns: what is known of each. Leaves to others: what an alias stands for (adapters/aliases.py), gRPC (service.py).
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path

from lorafleet.proto import worker_pb2
from lorafleet.workers.adapters.aliases import Aliases
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.engine.registered import FreedBytes
from lorafleet.workers.errors import AdapterRefusedError, LoRAFleetError, ModelError
from lorafleet.workers.text.adapter_texts import AdapterTexts
from lorafleet.workers.text.files import files_digest

_Key = tuple[str, int]


class AdapterRegistry:
    """Thread-safe. Calls block while files are read, but for `all` and `prefetch`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._aliases: Aliases[_Key] = Aliases(engine)
        self._lock = threading.Lock()
        self._adapters: dict[_Key, worker_pb2.Adapter] = {}
        self._directories: dict[_Key, Path] = {}
        self._text_lock = threading.Lock()  # another one, since building a tokenizer takes long
        self._texts = AdapterTexts(Path(engine.config.model), max_texts=4)

    def all(self) -> list[worker_pb2.Adapter]:
        with self._lock:
            return list(self._adapters.values())

    def register(self, request: worker_pb2.RegisterAdapterRequest) -> worker_pb2.Adapter:
        """Read and verify an adapter; one that is known under this name and version is not read again.

        Raises `AdapterRefusedError`, and `AdapterConflictError` when no more adapters can be pinned.
        """
        key = request.name, request.version
        with self._lock:
            known = self._adapters.get(key)
        if known is not None:
            return known
        spec = self._aliases.add(key, request.root, list(request.allowed_roots) or None).result()
        try:
            with self._text_lock:
                text = self._texts.of(spec.path, spec.folder.roots)
            if request.pin:
                self._engine.pin_adapter(spec.digest)
        except ModelError as error:
            self._aliases.remove(key)
            raise AdapterRefusedError(f"{spec.folder}: {error.message}", reason="bad_tokenizer") from error
        except LoRAFleetError:
            self._aliases.remove(key)
            raise
        adapter = worker_pb2.Adapter(
            name=request.name,
            digest=spec.digest,
            version=request.version,
            root=request.root,
            parent=request.parent,
            created=request.created,
            lora_rank=spec.lora_rank,
            text_digest="" if text is None else text.digest,
            vocab_size=spec.vocab_size,
            weight=request.weight,
            pin=request.pin,
            not_composable=spec.not_composable,
        )
        with self._lock:
            self._adapters[key] = adapter
            self._directories[key] = spec.path
        return adapter

    def text_files(self, digest: str) -> dict[str, bytes] | None:
        """Tokenizer and template of an adapter with this text_digest; None: there is none, or its files changed."""
        with self._lock:
            directories = [
                self._directories[key] for key, known in self._adapters.items() if known.text_digest == digest
            ]
        for directory in directories:
            with self._text_lock:
                files = self._texts.files(directory)
            if files is not None and files_digest(files) == digest:
                return files
        return None

    def prefetch(self, adapter: worker_pb2.Adapter) -> None:
        """Bring it into the host cache, if there is room, before the first request names it."""
        self._engine.prefetch_adapter(adapter.digest)

    def unregister(self, name: str, version: int) -> Future[FreedBytes] | None:
        """Forget it; what that frees, see `Aliases.remove`. Raises `UnknownModelError`."""
        with self._lock:
            self._adapters.pop((name, version), None)
            self._directories.pop((name, version), None)
        return self._aliases.remove((name, version)).result()
