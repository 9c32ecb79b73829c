"""The stepped offline engine: add requests one by one, call `step` until none is left."""

from __future__ import annotations

from pathlib import Path

from lorafleet.workers.args import EngineArgs
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.errors import LoRAFleetError, UnknownModelError
from lorafleet.workers.lora_ids import KnownAdapter, LoRAIds
from lorafleet.workers.outputs import RequestOutput
from lorafleet.workers.params import LoRARequest, SamplingParams
from lorafleet.workers.text.adapter_texts import AdapterTexts
from lorafleet.workers.text.model_text import ModelText
from lorafleet.workers.text_requests import Prompt, TextRequests

_WAIT_S = 0.5  # that a step waits for an adapter to load


class LLMEngine:
    """One model in this process, driven by its owner's thread. Create with `from_engine_args`."""

    def __init__(self, engine: Engine, *, seed: int | None) -> None:
        self.engine = engine
        self._texts = AdapterTexts(Path(engine.config.model))
        self.tokenizer = self._texts.model.tokenizer
        self._lora_ids = LoRAIds(engine, self._texts)
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
        """What a request names now; reads it if need be. Raises what `LoRAIds.find` fails with."""
        return self._lora_ids.find(lora_request).result()

    def text(self, lora_request: LoRARequest | None = None, known: KnownAdapter | None = None) -> ModelText:
        """Tokenizer and template: the adapter's own, if it has them, else the model's.

        known: what `find_lora` gave for it, so that it is not looked up again. Raises what that raises.
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
        """Queue a request, as many as you like; its outputs come from `step`.

        prompt: text, or token ids. known: what `find_lora` gave for lora_request, so that it is not looked up again.
        Raises what `TextRequests.open`, `find_lora` and `Engine.submit` raise; nothing of the request is left behind
        then.
        """
        if known is None and lora_request is not None:
            known = self.find_lora(lora_request)
        digest = None if known is None else known.spec.digest
        tokenizer = self.text(known=known).tokenizer
        generates = self._requests.open(
            request_id, prompt, params, lora=lora_request, digest=digest, tokenizer=tokenizer
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
        """Verify an adapter and bring it into the host cache before a request names it; with load_inplace, anew.

        Raises `AdapterConflictError`, `AdapterRefusedError`, `AdapterUnavailableError`, `ModelError`.
        """
        self._lora_ids.add(lora_request).result()
        return True

    def remove_lora(self, lora_id: int) -> bool:
        """Forget an id; its adapter's slot and memory are free when its requests have ended, at once if none is open.

        False when the id stands for nothing.
        """
        try:
            self._lora_ids.remove(lora_id).result()
        except UnknownModelError:
            return False
        if not self.has_unfinished_requests():
            self.engine.step()
        return True

    def pin_lora(self, lora_id: int) -> bool:
        """Keep an adapter in a device slot from now on, until it is removed. False when the id stands for nothing.

        Raises `AdapterConflictError` when all slots but one are taken so.
        """
        return self._lora_ids.pin(lora_id)

    def list_loras(self) -> set[int]:
        """The ids that stand for an adapter."""
        return self._lora_ids.known()

    def has_unfinished_requests(self) -> bool:
        return len(self._requests) > 0

    def step(self) -> list[RequestOutput]:
        """Run one engine step; the requests that got on, finished ones for the last time. Empty: there are none.

        Waits, for half a second at most, for an adapter to load when nothing else can run; without requests it returns
        at once. A request that failed (its adapter could not be loaded, its logits were not finite) comes back with
        `error` set; the others are unharmed. After a step that raises there are no requests and no more steps.
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
        """Stop the threads; requests that are open are forgotten."""
        self._lora_ids.close()
        self.engine.close()
        self._requests.clear()
