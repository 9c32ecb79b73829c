"""The engine's input and output: requests and events.

Everything here is numbers: the engine knows no text. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from enum import StrEnum
from typing import Annotated

from lorafleet.workers.errors import InvalidRequestError, LoRAFleetError
from lorafleet.workers.scheduling.logprobs import PromptLogprobs, TokenLogprobs
from lorafleet.workers.scheduling.prefix import parting_hash, root_hash
from lorafleet.workers.scheduling.ranges import Range, check_fields
from lorafleet.workers.scheduling.sampling_options import SamplingOptions

MAX_TENANT_CHARS = 256
MAX_SALT_CHARS = 1024
MAX_NAME_CHARS = 256  # of an adapter's name, as callers give it
ADAPTER_NAME = f"1 to {MAX_NAME_CHARS} printable characters without leading or trailing blanks"
MIN_WEIGHT, MAX_WEIGHT = 1e-3, 1e3
MAX_COMPOSED = 8  # adapters of one request
MAX_COMPOSED_WEIGHT = 100.0
MAX_PRIORITY = 2**31 - 1

Weight = Annotated[float, Range(MIN_WEIGHT, MAX_WEIGHT)]


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One choice to generate. Raises `InvalidRequestError` for a field that is out of range.

    A composition replaces `adapter`: a weighted sum of several adapters. It is kept sorted; a single adapter with the
    weight 1 becomes `adapter`.
    """

    request_id: str  # unique within the engine; the front end's
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingOptions
    adapter: str | None = None  # digest of a registered adapter; None is the base model
    _: KW_ONLY
    tenant: str = ""  # set by the gateway from the API key
    tenant_weight: Weight = 1.0  # share of service relative to other tenants
    adapter_weight: Weight = 1.0  # share relative to the tenant's other adapters
    priority: Annotated[int, Range(-MAX_PRIORITY, MAX_PRIORITY)] = 0  # lower is served earlier, whatever the shares
    cache_salt: str | None = None  # only the tenant's requests with the same salt share pages
    adapter_start: int = 0  # first prompt token that the adapter is applied to; set by the engine
    composition: tuple[tuple[str, float], ...] = ()  # (digest, weight), no digest twice
    # Output from a worker that was lost. Generation resumes after it as that worker would have: it counts as output
    # for max_tokens, penalties and random numbers.
    output_token_ids: tuple[int, ...] = ()
    text_digest: str = ""  # of the tokenizer that a grammar's bytes become tokens of; empty: the base model's

    def __post_init__(self) -> None:
        check_fields(self)
        if self.output_token_ids and len(self.output_token_ids) >= self.sampling.max_tokens:
            raise InvalidRequestError(
                f"{len(self.output_token_ids)} output tokens are there already; max_tokens is "
                f"{self.sampling.max_tokens}.",
                param="output_token_ids",
            )
        if len(self.tenant) > MAX_TENANT_CHARS:
            raise InvalidRequestError(
                f"The tenant's name has {len(self.tenant)} characters, the limit is {MAX_TENANT_CHARS}.", param="tenant"
            )
        if self.cache_salt is not None and not 0 < len(self.cache_salt) <= MAX_SALT_CHARS:
            raise InvalidRequestError(
                f"cache_salt has {len(self.cache_salt)} characters; give 1 to {MAX_SALT_CHARS}, or leave it out.",
                param="cache_salt",
            )
        if self.composition:
            self._check_composition()
            # 0.0 for -0.0, so that equal compositions have one name.
            composition = tuple(sorted((digest, float(weight) + 0.0) for digest, weight in self.composition))
            if len(composition) == 1 and composition[0][1] == 1.0:
                object.__setattr__(self, "adapter", composition[0][0])
                composition = ()
            object.__setattr__(self, "composition", composition)

    @property
    def digests(self) -> tuple[str, ...]:
        """Return the adapters that it needs, all at once."""
        if self.composition:
            return tuple(digest for digest, _ in self.composition)
        return () if self.adapter is None else (self.adapter,)

    @property
    def model_key(self) -> str | None:
        """Return its key for waiting, service and page sharing: an adapter's digest or a composition's name."""
        return "+".join(f"{digest}:{weight!r}" for digest, weight in self.composition) or self.adapter

    def of_choice(self, choice: int, output_token_ids: Sequence[int] = ()) -> GenerateRequest:
        """Return the same request for another of the API request's choices, resumed after its further output so far.

        Only the first choice brings the prompt's log-probabilities, which are the same for all.
        """
        if choice == self.sampling.choice and not output_token_ids:
            return self
        sampling = replace(
            self.sampling, choice=choice, prompt_logprobs=None if choice else self.sampling.prompt_logprobs
        )
        return replace(self, sampling=sampling, output_token_ids=(*self.output_token_ids, *output_token_ids))

    def _check_composition(self) -> None:
        digests = {digest for digest, _ in self.composition}
        if self.adapter is not None or len(digests) < len(self.composition):
            raise InvalidRequestError("An adapter may be named once, alone or among several.", param="adapters")
        if len(digests) > MAX_COMPOSED:
            raise InvalidRequestError(
                f"{len(digests)} adapters are named; at most {MAX_COMPOSED} may be.", param="adapters"
            )
        for _, weight in self.composition:
            check_composed_weight(weight, "An adapter's weight", "adapters")


def check_composed_weight(weight: float, whose: str, param: str) -> None:
    """Raises `InvalidRequestError` for an invalid weight in a composition."""
    if not abs(weight) <= MAX_COMPOSED_WEIGHT:  # false for NaN too
        raise InvalidRequestError(
            f"{whose} is {weight:g}; it must be between {-MAX_COMPOSED_WEIGHT:g} and {MAX_COMPOSED_WEIGHT:g}.",
            param=param,
        )


def is_adapter_name(name: str) -> bool:
    """Return whether callers may give an adapter this name: see `ADAPTER_NAME`."""
    return 0 < len(name) <= MAX_NAME_CHARS and name.isprintable() and name == name.strip()


class FinishReason(StrEnum):
    STOP = "stop"  # the last token is EOS or one of stop_token_ids
    COMPLETE = "complete"  # after the last token the request's grammar allows nothing more
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class RequestEvent:
    """The result of one engine step for one request. An event with a `finish` is the request's last."""

    request_id: str
    token_id: int | None = None  # None: the request got a part of `prompt_logprobs`, or ended without a new token
    _: KW_ONLY
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: PromptLogprobs | None = None  # of the next prompt tokens, from the second one on
    finish: FinishReason | None = None
    error: LoRAFleetError | None = None  # with finish ERROR
    num_cached_tokens: int = 0  # with a request's first token, or its end without one: prompt tokens not computed


@dataclass(slots=True, weakref_slot=True, eq=False, kw_only=True)
class Request:
    """The engine's state of one choice. Owned by the scheduler and its parts; nothing else changes it.

    Invariant: 0 <= num_computed_tokens <= len(token_ids), and `pages` hold the keys and values of exactly the
    computed tokens. After a preemption num_computed_tokens is 0; when the request resumes, cached pages are found
    again, and the rest is recomputed with the output so far.

    During a step its tokens count as computed, and the token to be sampled is in `token_ids` as a 0, pending until
    it is known.
    """

    request_id: str
    sampling: SamplingOptions
    adapter: str | None  # digest, or a composition's name; None is the base model
    token_ids: list[int]  # prompt, then output
    num_prompt_tokens: int
    arrival: int  # order of arrival within the engine; older is smaller
    tenant: str = ""
    tenant_weight: float = 1.0
    adapter_weight: float = 1.0
    priority: int = 0
    digests: tuple[str, ...] = ()  # adapters whose slots it needs to run, all at once
    weights: tuple[float, ...] = ()  # of each adapter
    adapter_start: int = 0  # the tokens before it are computed with the base model
    prefix_root: bytes = b""  # prefix.py; requests with the same root may share pages
    prefix_parting: bytes = b""  # from the page of adapter_start on, this must be equal too
    prefix_hashes: list[bytes] = field(default_factory=list)  # of its full pages, computed as needed
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0  # at the end of token_ids
    pages: list[int] = field(default_factory=list)
    num_hashed_pages: int = 0  # leading `pages` whose hashes need not be given to the pool any more
    num_cached_tokens: int | None = None  # prompt tokens found in the cache at its first start
    num_preemptions: int = 0
    was_preempted_for_turn: bool = False  # its last preemption was for the turn of others
    is_charged: bool = False  # the prompt is in the service counters; recomputing it is not charged again
    is_urgent: bool = False  # started because its flow had waited too long
    started_at: float = 0.0  # time of its last start
    num_tokens_at_start: int = 0  # known tokens at its last start
    last_step: int = 0  # number of the step that had its newest single token

    @classmethod
    def from_generate(cls, request: GenerateRequest, arrival: int) -> Request:
        adapter, start = request.model_key, request.adapter_start
        parts = adapter is not None and start > 0
        return cls(
            request_id=request.request_id,
            sampling=request.sampling,
            adapter=adapter,
            token_ids=[*request.prompt_token_ids, *request.output_token_ids],
            num_prompt_tokens=len(request.prompt_token_ids),
            arrival=arrival,
            tenant=request.tenant,
            tenant_weight=request.tenant_weight,
            adapter_weight=request.adapter_weight,
            priority=request.priority,
            digests=request.digests,
            weights=tuple(weight for _, weight in request.composition) or (1.0,) * len(request.digests),
            adapter_start=start,
            prefix_root=root_hash(request.tenant, request.cache_salt or "", None if parts else adapter),
            prefix_parting=parting_hash(adapter, start) if adapter is not None and parts else b"",
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_known_tokens(self) -> int:
        return len(self.token_ids) - self.num_pending_tokens

    @property
    def is_ending(self) -> bool:
        """Return whether its last token is sampled, even if not known yet."""
        return self.num_output_tokens >= max(1, self.sampling.max_tokens)

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Return whether its prompt's log-probabilities are wanted; they are complete with the first output token."""
        return self.sampling.prompt_logprobs is not None and len(self.token_ids) == self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def has_progressed(self) -> bool:
        """Return whether it has got a token since its last start."""
        return len(self.token_ids) > self.num_tokens_at_start
