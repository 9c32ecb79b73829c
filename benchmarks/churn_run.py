"""One run of churn: requests over many adapters, which meanwhile come, change and go; every answer is checked.

Owns: what happens when, by a seed, and what became of each request. Leaves to others: flags, tables, pictures
(churn.py), the adapters' files (random_adapters.py).

The engine is stepped in the calling thread; adapters are registered through `Aliases`, as the worker does it.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorafleet.workers.adapters.aliases import Aliases
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.engine.request import FinishReason, GenerateRequest, RequestEvent
from lorafleet.workers.engine.sampling_options import SamplingOptions
from lorafleet.workers.errors import LoRAFleetError, QueueFullError

NEAR_TIE = 1e-3  # of two logits: closer ones may come out either way, since kernels differ by batch size
BASE = ""  # the base model's name
MAX_COMPOSED = 3  # adapters of a request


@dataclass(frozen=True, slots=True)
class ChurnSettings:
    """Rates are per second; 0 is never."""

    num_requests: int = 500
    arrival_rate: float = 200.0
    zipf_alpha: float = 1.0  # the k-th most popular adapter is asked for as k^-alpha
    base_share: float = 0.1  # of requests, for the base model
    composed_share: float = 0.0  # of requests, for up to MAX_COMPOSED adapters at once, weighted
    abort_rate: float = 5.0  # requests that their client gives up
    reload_rate: float = 5.0  # adapters whose file changes and that are loaded again under their name
    retire_rate: float = 5.0  # adapters that are unloaded; another one comes in their place
    num_prompts: int = 24  # different ones; they share beginnings
    max_prompt_tokens: int = 48
    max_output_tokens: int = 24
    num_tenants: int = 3
    step_s: float | None = None  # that every step is taken to last, on whatever machine; None: what it does last
    seed: int = 0


@dataclass(slots=True)
class Ask:
    """One request and what came of it. Moments in seconds of one monotonic clock."""

    request: GenerateRequest
    names: tuple[str, ...]  # of its adapters; none: the base model
    contents: tuple[tuple[str, float], ...]  # of their files: the directories that they were copied from; and weights
    is_cold: bool  # its adapter was in no slot when it was sent
    sent_s: float
    token_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    num_terminal: int = 0
    error: LoRAFleetError | None = None

    @property
    def name(self) -> str:
        """For people."""
        return "+".join(self.names) or BASE


@dataclass(slots=True)
class ChurnResult:
    asks: list[Ask]
    num_refused: int  # 429
    num_reloads: int
    num_retired: int
    num_aborted: int
    step_s: list[float]
    elapsed_s: float


class Churn:
    """Adapters `live`, each name with the content that it has now."""

    def __init__(
        self, engine: Engine, contents: Sequence[Path], names: Sequence[str], scratch: Path, settings: ChurnSettings
    ) -> None:
        """contents: adapter directories, more than names; each name begins with one of its own."""
        assert len(contents) >= len(names)
        self._engine = engine
        self._settings = settings
        self._contents = list(contents)
        self._scratch = scratch
        self._rng = random.Random(settings.seed)
        self._aliases: Aliases[str] = Aliases(engine)
        self._content_of: dict[str, str] = {}
        self._directories: dict[str, Path] = {}  # of the live names
        self._num_directories = 0
        self._open: dict[str, Ask] = {}
        self._names = list(names)  # most popular first
        self._num_names = len(names)
        self._weights = [1 / (rank + 1) ** settings.zipf_alpha for rank in range(len(names))]
        vocab = range(3, engine.vocab_size)
        stem = self._rng.choices(vocab, k=settings.max_prompt_tokens)
        self._prompts = [
            tuple(stem[: self._rng.randrange(len(stem))] + self._rng.choices(vocab, k=self._rng.randrange(1, 16)))[
                : settings.max_prompt_tokens
            ]
            for _ in range(settings.num_prompts)
        ]
        self._stops = frozenset(self._rng.sample(vocab, min(64, len(vocab) // 8)))
        for name, content in zip(names, contents, strict=False):
            self._put(name, content, self._new_directory())

    @property
    def names(self) -> list[str]:
        """Those that are live, most popular first."""
        return list(self._names)

    def run(self) -> ChurnResult:
        """Returns when every request has ended. The adapters stay; `close` unloads them."""
        settings, engine = self._settings, self._engine
        result = ChurnResult([], 0, 0, 0, 0, [], 0.0)
        due = {"arrive": 0.0, "abort": 0.0, "reload": 0.0, "retire": 0.0}
        rates = {
            "arrive": settings.arrival_rate,
            "abort": settings.abort_rate,
            "reload": settings.reload_rate,
            "retire": settings.retire_rate,
        }
        began = time.monotonic()
        for what, rate in rates.items():
            due[what] = self._rng.expovariate(rate) if rate else float("inf")
        num_sent = num_turns = 0
        while num_sent < settings.num_requests or engine.has_unfinished():
            now = time.monotonic() - began if settings.step_s is None else num_turns * settings.step_s
            num_turns += 1
            for what in due:
                while due[what] <= now and num_sent < settings.num_requests:
                    due[what] += self._rng.expovariate(rates[what])
                    if what == "arrive":
                        num_sent += 1
                        self._arrive(f"r{num_sent}", result)
                    elif what == "abort" and self._open:
                        engine.cancel(self._rng.choice(sorted(self._open)))
                        result.num_aborted += 1
                    elif what == "reload":
                        self._reload()
                        result.num_reloads += 1
                    elif what == "retire":
                        self._retire(result)
            if engine.wait_for_work(timeout_s=max(0.0, min(0.05, min(due.values()) - now))):
                step_began = time.monotonic()
                self._book(engine.step())
                result.step_s.append(time.monotonic() - step_began)
        result.elapsed_s = time.monotonic() - began
        return result

    def close(self) -> None:
        """Unload every adapter; returns when all is freed."""
        freed = [self._aliases.remove(name).result() for name in list(self._content_of)]
        while not all(future is None or future.done() for future in freed):
            self._engine.wait_for_work(timeout_s=0.1)
            self._engine.step()
        self._aliases.close()

    def _arrive(self, request_id: str, result: ChurnResult) -> None:
        rng, settings = self._rng, self._settings
        names, composition = self._draw()
        greedy = rng.random() < 0.5
        request = GenerateRequest(
            request_id,
            rng.choice(self._prompts),
            SamplingOptions(
                max_tokens=rng.choice((1, settings.max_output_tokens // 2, settings.max_output_tokens)),
                temperature=0.0 if greedy else 0.8,
                top_p=1.0 if greedy else 0.95,
                seed=rng.randrange(2),
                stop_token_ids=self._stops if rng.random() < 0.3 else frozenset(),
                ignore_eos=rng.random() < 0.5,
            ),
            tenant=f"tenant-{rng.randrange(settings.num_tenants)}",
            priority=rng.choice((0, 0, 0, 1)),
            composition=composition,
        )
        is_cold = not set(request.digests).issubset(self._engine.stats().device_adapters)
        contents = tuple((self._content_of[name], weight) for name, (_, weight) in zip(names, composition, strict=True))
        ask = Ask(request, names, contents, is_cold, time.monotonic())
        try:
            self._engine.submit(request)
        except QueueFullError:
            result.num_refused += 1
            return
        self._open[request_id] = ask
        result.asks.append(ask)

    def _draw(self) -> tuple[tuple[str, ...], tuple[tuple[str, float], ...]]:
        """Names of adapters, their digests and weights; one has the weight 1, and the base model is none."""
        rng, settings = self._rng, self._settings
        kind = rng.random()
        if kind < settings.base_share:
            return (), ()
        num = 1 if kind < 1 - settings.composed_share else rng.randint(2, MAX_COMPOSED)
        names: dict[str, str] = {}  # by digest: two names may have one content
        for name in rng.choices(self._names, self._weights, k=num):
            spec = self._aliases.get(name)
            assert spec is not None
            names.setdefault(spec.digest, name)
        weights = [1.0] if num == 1 else [rng.choice((0.5, 1.0, -0.25)) for _ in names]
        return tuple(names.values()), tuple(zip(names, weights, strict=True))

    def _new_directory(self) -> Path:
        self._num_directories += 1
        directory = self._scratch / f"{self._num_directories}"
        directory.mkdir()
        return directory

    def _reload(self) -> None:
        """Load another content under a name, from a directory of its own or in the place of the old one's files."""
        name, content = self._rng.choice(self._names), self._rng.choice(self._contents)
        if self._rng.random() < 0.5:
            self._put(name, content, self._new_directory())
            return
        self._put(name, content, self._directories[name])

    def _put(self, name: str, content: Path, directory: Path) -> None:
        for file in content.iterdir():
            shutil.copy(file, directory / f"{file.name}.new")
            (directory / f"{file.name}.new").rename(directory / file.name)
        self._aliases.add(name, str(directory)).result()
        self._content_of[name] = content.name
        self._directories[name] = directory

    def _retire(self, result: ChurnResult) -> None:
        """One name goes, a new one takes its place among the popular."""
        place = self._rng.randrange(len(self._names))
        old = self._names[place]
        self._aliases.remove(old).result()
        del self._content_of[old], self._directories[old]
        self._num_names += 1
        self._names[place] = f"late-{self._num_names}"
        self._put(self._names[place], self._rng.choice(self._contents), self._new_directory())
        result.num_retired += 1

    def _book(self, events: Sequence[RequestEvent]) -> None:
        now = time.monotonic()
        for event in events:
            ask = self._open[event.request_id]  # an event after the terminal one fails here
            if event.token_id is not None:
                ask.token_ids.append(event.token_id)
                ask.token_s.append(now)
            if event.finish is not None:
                ask.finish, ask.error = event.finish, event.error
                ask.num_terminal += 1
                del self._open[event.request_id]


class Reference:
    """What each request is answered when it has an engine to itself."""

    def __init__(self, engine: Engine, contents: Sequence[Path]) -> None:
        """The engine holds the same model, has MAX_COMPOSED slots, and nobody else uses it."""
        self._engine = engine
        self._digests = {path.name: engine.register_adapter(str(path)).digest for path in contents}
        self._known: dict[object, tuple[list[int], list[float], FinishReason]] = {}

    def is_right(self, ask: Ask) -> bool:
        """Whether an ended request got what it should, as far as it came if it was given up."""
        token_ids, margins, finish = self._answer(ask)
        for place, (own, right) in enumerate(zip(ask.token_ids, token_ids, strict=False)):
            if own != right:  # behind a near tie all may be different
                return ask.request.sampling.temperature == 0.0 and margins[place] < NEAR_TIE
        if ask.finish is FinishReason.CANCELLED:
            return len(ask.token_ids) <= len(token_ids)
        return ask.finish is finish and len(ask.token_ids) == len(token_ids)

    def _answer(self, ask: Ask) -> tuple[list[int], list[float], FinishReason]:
        request = ask.request
        sampling = request.sampling
        key = (frozenset(ask.contents), request.prompt_token_ids, sampling)
        if key not in self._known:
            options = SamplingOptions(
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.seed,
                stop_token_ids=sampling.stop_token_ids,
                ignore_eos=sampling.ignore_eos,
                logprobs=2,
            )
            parts = tuple((self._digests[content], weight) for content, weight in ask.contents)
            self._engine.submit(GenerateRequest("alone", request.prompt_token_ids, options, composition=parts))
            token_ids: list[int] = []
            margins: list[float] = []
            finish = None
            while finish is None:
                self._engine.wait_for_work(timeout_s=1.0)
                for event in self._engine.step():
                    assert event.error is None, event.error
                    if event.token_id is not None:
                        assert event.logprobs is not None
                        token_ids.append(event.token_id)
                        margins.append(event.logprobs.top_logprobs[0] - event.logprobs.top_logprobs[1])
                    finish = event.finish
            self._known[key] = token_ids, margins, finish
        return self._known[key]
