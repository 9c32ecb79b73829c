"""The stepped offline engine: add requests one by one, call `step` until none is left."""

from __future__ import annotations

from lorafleet.workers.args import EngineArgs
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.errors import LoRAFleetError
from lorafleet.workers.lora_ids import LoRAIds
from lorafleet.workers.outputs import RequestOutput
from lorafleet.workers.params import LoRARequest, SamplingParams
from lorafleet.workers.text.tokenizer import Tokenizer
from lorafleet.workers.text_requests import Prompt, TextRequests


class LLMEngine:
    """One model in this process, driven by its owner's thread. Create with `from_engine_args`."""

    def __init__(self, engine: Engine, *, seed: int | None) -> None:
        self.engine = engine
        self.tokenizer = Tokenizer.from_dir(engine.config.model)
        self._lora_ids = LoRAIds(engine)
        self._requests = TextRequests(
            self.tokenizer, max_model_len=engine.max_model_len, vocab_size_of=engine.vocab_size_of, seed=seed
        )

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> LLMEngine:
        """Load the model. Raises `ConfigError`, `ModelError` or `MemoryPlanError`."""
        config = args.to_config()
        engine = Engine.from_config(config)
        engine.load()
        engine.bind_thread()
        return cls(engine, seed=args.seed)

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        lora_request: LoRARequest | None = None,
    ) -> None:
        """Queue a request; its outputs come from `step`.

        prompt: text, or token ids. Raises what `TextRequests.open`, `LoRAIds.digest` and `Engine.submit` raise; nothing
        of the request is left behind then.
        """
        digest = self._lora_ids.digest(lora_request)
        generates = self._requests.open(request_id, prompt, params, lora_request, digest)
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

    def has_unfinished_requests(self) -> bool:
        return len(self._requests) > 0

    def step(self) -> list[RequestOutput]:
        """Run one engine step; the requests that got on, finished ones for the last time.

        Waits for an adapter to load when nothing else can run. A request that failed (its adapter could not be loaded,
        its logits were not finite) comes back with `error` set; the others are unharmed.
        """
        self.engine.bind_thread()
        self.engine.wait_for_work()
        outputs = self._requests.apply(self.engine.step())
        for engine_id in self._requests.take_cancels():
            self.engine.cancel(engine_id)
        return outputs

    def close(self) -> None:
        self.engine.close()
