"""The stepped offline engine: add requests one by one, then call `step` until none is left."""

from __future__ import annotations

from pathlib import Path

from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.errors import LoRAFleetError, UnknownModelError
from lorafleet.workers.offline.args import EngineArgs
from lorafleet.workers.offline.lora_ids import KnownAdapter, LoRAIds
from lorafleet.workers.offline.outputs import RequestOutput
from lorafleet.workers.offline.text_requests import Prompt, TextRequests
from lorafleet.workers.params import LoRARequest, SamplingParams
from lorafleet.workers.text.adapter_tokenizers import AdapterTokenizers
from lorafleet.workers.text.model_text import ModelText

_WAIT_S = 0.5  # maximum wait of a step for an adapter load


class LLMEngine:
    """One model in this process, driven by its owner's thread. Create with `from_engine_args`."""

    def __init__(self, engine: Engine, *, seed: int | None) -> None:
        self.engine = engine
        self._texts = AdapterTokenizers(Path(engine.config.model))
        self.tokenizer = self._texts.model.tokenizer
        self._lora_ids = LoRAIds(engine, self._texts)
        engine.use_tokenizers(self._lora_ids.tokenizer)
        self._requests = TextRequests(max_model_len=engine.max_model_len, vocab_size_of=engine.vocab_size_of, seed=seed)

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> LLMEngine:
        """Load the model. Raises `ConfigError`, `ModelError` or `MemoryPlanError`."""
        config = args.to_config()
        engine = Engine.from_config(config)
        engine.load()
        engine.bind_thread()
        return cls(engine, seed=args.seed)

    def find_lora(self, lora_request: LoRARequest) -> KnownAdapter:
        """Return a request's adapter, reading it if needed. Raises what the future of `LoRAIds.find` fails with."""
        return self._lora_ids.find(lora_request).result()

    def text(self, lora_request: LoRARequest | None = None, known: KnownAdapter | None = None) -> ModelText:
        """Return the adapter's own tokenizer and template if it has them, else the model's.

        known: the result of `find_lora`, to avoid another look-up. Raises what `find_lora` raises.
        """
        if known is None and lora_request is not None:
            known = self.find_lora(lora_request)
        return (None if known is None else known.text) or self._texts.model

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        lora_request: LoRARequest | None = None,
        *,
        known: KnownAdapter | None = None,
    ) -> None:
        """Queue a request; its outputs come from `step`. Any number may be queued.

        prompt: text, or token ids. known: the result of `find_lora` for lora_request, to avoid another look-up. Raises
        what `TextRequests.open`, `find_lora` and `Engine.submit` raise; the request then leaves no trace.
        """
        if known is None and lora_request is not None:
            known = self.find_lora(lora_request)
        digest = None if known is None else known.spec.digest
        generates = self._requests.open(
            request_id,
            prompt,
            self._requests.checked(params),
            lora=lora_request,
            digest=digest,
            tokenizer=self.text(known=known).tokenizer,
            text_digest=known.text.digest if known is not None and known.text is not None else "",
        )
        submitted = 0
        try:
            for generate in generates:
                self.engine.submit(generate)
                submitted += 1
        except LoRAFleetError:
            self._requests.drop(request_id)
            for generate in generates[:submitted]:
                self.engine.cancel(generate.request_id)
            raise

    def abort_request(self, request_id: str) -> None:
        """End a request; the next `step` returns it with finish_reason "abort"."""
        for engine_id in self._requests.engine_ids(request_id):
            self.engine.cancel(engine_id)

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Verify an adapter and load it into the host cache before its first request. load_inplace: read it again.

        Raises `AdapterConflictError`, `AdapterRefusedError`, `AdapterUnavailableError`, `ModelError`.
        """
        self._lora_ids.add(lora_request).result()
        return True

    def remove_lora(self, lora_id: int) -> bool:
        """Remove an id; its adapter's slot and memory are freed when its requests have ended, at once if none is open.

        Return False if the id is unknown.
        """
        try:
            self._lora_ids.remove(lora_id).result()
        except UnknownModelError:
            return False
        if not self.has_unfinished_requests():
            self.engine.step()
        return True

    def pin_lora(self, lora_id: int) -> bool:
        """Keep an adapter in a device slot until it is removed. Return False if the id is unknown.

        Raises `AdapterConflictError` if only one slot is left unpinned.
        """
        return self._lora_ids.pin(lora_id)

    def list_loras(self) -> set[int]:
        """Return the ids in use."""
        return self._lora_ids.known()

    def has_unfinished_requests(self) -> bool:
        return len(self._requests) > 0

    def step(self) -> list[RequestOutput]:
        """Run one engine step; return the requests with new output. A finished request is returned for the last time.

        Waits at most half a second for an adapter load if nothing else can run; without requests it returns [] at once.
        A request that failed (adapter not loadable, logits not finite) is returned with `error` set; the others are
        unaffected. After a step that raises, all requests are dropped and no more steps are possible.
        """
        self.engine.bind_thread()
        if not self.engine.wait_for_work(timeout_s=_WAIT_S if self.has_unfinished_requests() else 0.0):
            return []
        try:
            events = self.engine.step()
        except Exception:
            self._requests.clear()
            raise
        outputs = self._requests.apply(events)
        for engine_id in self._requests.take_cancels():
            self.engine.cancel(engine_id)
        return outputs

    def close(self) -> None:
        """Stop the threads; open requests are dropped."""
        self._lora_ids.close()
        self.engine.close()
        self._requests.close()
