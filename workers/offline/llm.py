"""The offline API, as in vLLM: `LLM(model=..., enable_lora=True).generate(prompts, params, lora_request=...)`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lorafleet.workers.errors import InvalidRequestError, QueueFullError, quoted
from lorafleet.workers.offline.args import EngineArgs
from lorafleet.workers.offline.llm_engine import LLMEngine
from lorafleet.workers.offline.lora_ids import KnownAdapter
from lorafleet.workers.offline.outputs import RequestOutput
from lorafleet.workers.params import LoRARequest, SamplingParams
from lorafleet.workers.text.generation_defaults import read_generation_defaults
from lorafleet.workers.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model in this process, without Ray. The keyword arguments are those of `EngineArgs`.

    Usable as a context manager; `close` stops its threads.
    """

    def __init__(self, model: str, **kwargs: Any) -> None:
        self.llm_engine = LLMEngine.from_engine_args(EngineArgs(model=model, **kwargs))
        self._ids = itertools.count()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.llm_engine.close()

    def get_tokenizer(self, lora_request: LoRARequest | None = None) -> Tokenizer:
        """Return the adapter's own tokenizer if it has one, else the model's."""
        return self.llm_engine.text(lora_request).tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the model's defaults, from its generation_config.json."""
        return SamplingParams(**read_generation_defaults(Path(self.llm_engine.engine.config.model)))

    def generate(
        self,
        prompts: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any] | Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate for one prompt or several; outputs are in the order of the prompts.

        A prompt is text, {"prompt": text}, {"prompt_token_ids": ids} or a list of ids. sampling_params and lora_request
        are one for all or one per prompt. Adapter files that have changed since the last call are read again. Raises
        `InvalidRequestError`, `ContextLengthError`, `AdapterRefusedError`, `AdapterConflictError` before anything runs,
        and a request's own error after the others are done.
        """
        if isinstance(prompts, str | Mapping):
            prompts = [prompts]
        batch = _list_of("prompts", prompts)
        inputs = [_prompt(prompt) for prompt in batch]
        return self._run(inputs, sampling_params, lora_request, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Generate the next message of one conversation or several, with the adapter's chat template or the model's.

        tools: functions, in OpenAI's form, that the prompts describe; calls of them are part of the outputs' text.
        """
        batch = _list_of("messages", messages)
        if not batch:
            raise InvalidRequestError("messages is empty; give at least one message.", param="messages")
        conversations = cast(Sequence[Messages], [batch] if isinstance(batch[0], Mapping) else batch)
        loras = _one_each("lora_request", lora_request, (LoRARequest, type(None)), len(conversations))
        found = _Found(self.llm_engine)
        inputs = [
            self.llm_engine.text(known=found.of(lora)).encode_chat(
                conversation, add_generation_prompt=add_generation_prompt, add_special_tokens=False, tools=tools
            )
            for conversation, lora in zip(conversations, loras, strict=True)
        ]
        return self._run(inputs, sampling_params, loras, use_tqdm, found)

    def _run(
        self,
        inputs: Sequence[str | list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None,
        use_tqdm: bool,
        found: _Found | None = None,
    ) -> list[RequestOutput]:
        default = self.get_default_sampling_params() if sampling_params is None else sampling_params
        params = _one_each("sampling_params", default, SamplingParams, len(inputs))
        loras = _one_each("lora_request", lora_request, (LoRARequest, type(None)), len(inputs))
        engine, found = self.llm_engine, found or _Found(self.llm_engine)
        ids = [str(next(self._ids)) for _ in inputs]
        outputs: dict[str, RequestOutput] = {}
        try:
            with _Bar(len(ids), use_tqdm, outputs) as bar:
                for request_id, prompt, own_params, lora in zip(ids, inputs, params, loras, strict=True):
                    known = found.of(lora)
                    while True:
                        try:
                            engine.add_request(request_id, prompt, own_params, lora, known=known)
                            break
                        except QueueFullError:  # max_adapter_wait_s allows no more in the queue
                            if not engine.has_unfinished_requests():
                                raise
                            bar.take(engine.step())
                while engine.has_unfinished_requests():
                    bar.take(engine.step())
        except BaseException:
            # Ctrl-C, or a bad prompt after good ones: leave no request in the engine.
            for request_id in ids:
                engine.abort_request(request_id)
            while engine.has_unfinished_requests():
                engine.step()
            raise
        for request_id in ids:
            error = outputs[request_id].error
            if error is not None:
                raise error
        return [outputs[request_id] for request_id in ids]


class _Found:
    """The adapters of one call's lora_requests, each looked up once, so that all of the call use the same content."""

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self._known: dict[LoRARequest, KnownAdapter] = {}

    def of(self, lora: LoRARequest | None) -> KnownAdapter | None:
        """Return a request's adapter. Raises what `LLMEngine.find_lora` raises."""
        if lora is None:
            return None
        known = self._known.get(lora)
        if known is None:
            known = self._known[lora] = self._engine.find_lora(lora)
        return known


class _Bar:
    """Collects outputs and shows the progress."""

    def __init__(self, num_requests: int, shows: bool, outputs: dict[str, RequestOutput]) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[speed]}"),
        )
        self._outputs = outputs
        self._num_tokens = 0
        self._progress = Progress(*columns, disable=not shows)
        self._task = self._progress.add_task("prompts", total=num_requests, speed="")

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def take(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            if output.finished:
                self._outputs[output.request_id] = output
                self._num_tokens += sum(len(choice.token_ids) for choice in output.outputs)
                elapsed_s = self._progress.tasks[0].elapsed
                speed = f"{self._num_tokens / elapsed_s:.1f} output tok/s" if elapsed_s else ""
                self._progress.update(self._task, advance=1, speed=speed)


def _prompt(prompt: object) -> str | list[int]:
    if isinstance(prompt, Mapping):
        if set(prompt) == {"prompt_token_ids"}:
            return _token_ids(prompt["prompt_token_ids"])
        if set(prompt) == {"prompt"} and isinstance(prompt["prompt"], str):
            return prompt["prompt"]
        raise InvalidRequestError(
            f"A prompt is {quoted(prompt)}; a mapping must have either 'prompt', a string, or 'prompt_token_ids'.",
            param="prompt",
        )
    return prompt if isinstance(prompt, str) else _token_ids(prompt)


def _token_ids(value: object) -> list[int]:
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise InvalidRequestError(f"A prompt is {quoted(value)}; give text or a list of token ids.", param="prompt")
    return list(value)


def _list_of(name: str, values: object) -> list[Any]:
    if not isinstance(values, Iterable) or isinstance(values, str | bytes):
        raise InvalidRequestError(f"{name} is {quoted(values)}; it must be a list.", param=name)
    return list(values)


def _one_each(name: str, value: Any, kind: type | tuple[type, ...], count: int) -> list[Any]:
    if isinstance(value, kind):
        return [value] * count
    if not isinstance(value, Sequence) or not all(isinstance(item, kind) for item in value):
        raise InvalidRequestError(f"{name} is {quoted(value)}; give one for all or one per prompt.", param=name)
    if len(value) != count:
        raise InvalidRequestError(
            f"{name} has {len(value)} entries for {count} prompts; give one for all or one per prompt.", param=name
        )
    return list(value)
