from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Finish(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_NONE: _ClassVar[Finish]
    FINISH_STOP: _ClassVar[Finish]
    FINISH_LENGTH: _ClassVar[Finish]
    FINISH_COMPLETE: _ClassVar[Finish]

class WorkerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_STARTING: _ClassVar[WorkerState]
    WORKER_READY: _ClassVar[WorkerState]
    WORKER_DRAINING: _ClassVar[WorkerState]

class AdapterTier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADAPTER_ABSENT: _ClassVar[AdapterTier]
    ADAPTER_DISK: _ClassVar[AdapterTier]
    ADAPTER_HOST: _ClassVar[AdapterTier]
    ADAPTER_DEVICE: _ClassVar[AdapterTier]
FINISH_NONE: Finish
FINISH_STOP: Finish
FINISH_LENGTH: Finish
FINISH_COMPLETE: Finish
WORKER_STARTING: WorkerState
WORKER_READY: WorkerState
WORKER_DRAINING: WorkerState
ADAPTER_ABSENT: AdapterTier
ADAPTER_DISK: AdapterTier
ADAPTER_HOST: AdapterTier
ADAPTER_DEVICE: AdapterTier

class GatewayMessage(_message.Message):
    __slots__ = ("hello", "generate", "cancel")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    GENERATE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    generate: Generate
    cancel: Cancel
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., generate: _Optional[_Union[Generate, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ...) -> None: ...

class WorkerMessage(_message.Message):
    __slots__ = ("welcome", "step", "heartbeat")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    step: StepOutputs
    heartbeat: Heartbeat
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., step: _Optional[_Union[StepOutputs, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("worker_id", "generation", "gateway_id")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    generation: int
    gateway_id: str
    def __init__(self, worker_id: _Optional[str] = ..., generation: _Optional[int] = ..., gateway_id: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("worker_id", "generation")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    generation: int
    def __init__(self, worker_id: _Optional[str] = ..., generation: _Optional[int] = ...) -> None: ...

class Generate(_message.Message):
    __slots__ = ("stream", "request_id", "adapter_digest", "prompt_token_ids", "sampling", "tenant", "tenant_weight", "adapter_weight", "priority", "cache_salt", "composition", "output_token_ids", "text_digest")
    STREAM_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TENANT_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    COMPOSITION_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    stream: int
    request_id: str
    adapter_digest: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: Sampling
    tenant: str
    tenant_weight: float
    adapter_weight: float
    priority: int
    cache_salt: str
    composition: _containers.RepeatedCompositeFieldContainer[ComposedAdapter]
    output_token_ids: _containers.RepeatedScalarFieldContainer[int]
    text_digest: str
    def __init__(self, stream: _Optional[int] = ..., request_id: _Optional[str] = ..., adapter_digest: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., tenant: _Optional[str] = ..., tenant_weight: _Optional[float] = ..., adapter_weight: _Optional[float] = ..., priority: _Optional[int] = ..., cache_salt: _Optional[str] = ..., composition: _Optional[_Iterable[_Union[ComposedAdapter, _Mapping]]] = ..., output_token_ids: _Optional[_Iterable[int]] = ..., text_digest: _Optional[str] = ...) -> None: ...

class ComposedAdapter(_message.Message):
    __slots__ = ("digest", "weight")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    digest: str
    weight: float
    def __init__(self, digest: _Optional[str] = ..., weight: _Optional[float] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "choice", "logprobs", "stop_token_ids", "ignore_eos", "min_tokens", "grammar", "logit_bias", "allowed_token_ids", "bad_words")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    choice: int
    logprobs: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    min_tokens: int
    grammar: str
    logit_bias: _containers.ScalarMap[int, float]
    allowed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    bad_words: _containers.RepeatedCompositeFieldContainer[TokenIds]
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., choice: _Optional[int] = ..., logprobs: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: bool = ..., min_tokens: _Optional[int] = ..., grammar: _Optional[str] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., allowed_token_ids: _Optional[_Iterable[int]] = ..., bad_words: _Optional[_Iterable[_Union[TokenIds, _Mapping]]] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("stream",)
    STREAM_FIELD_NUMBER: _ClassVar[int]
    stream: int
    def __init__(self, stream: _Optional[int] = ...) -> None: ...

class StepOutputs(_message.Message):
    __slots__ = ("step", "stream", "token_id", "finish", "logprobs", "ended", "cached")
    STEP_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    step: int
    stream: _containers.RepeatedScalarFieldContainer[int]
    token_id: _containers.RepeatedScalarFieldContainer[int]
    finish: _containers.RepeatedScalarFieldContainer[Finish]
    logprobs: _containers.RepeatedCompositeFieldContainer[Logprobs]
    ended: _containers.RepeatedCompositeFieldContainer[Ended]
    cached: _containers.RepeatedCompositeFieldContainer[Cached]
    def __init__(self, step: _Optional[int] = ..., stream: _Optional[_Iterable[int]] = ..., token_id: _Optional[_Iterable[int]] = ..., finish: _Optional[_Iterable[_Union[Finish, str]]] = ..., logprobs: _Optional[_Iterable[_Union[Logprobs, _Mapping]]] = ..., ended: _Optional[_Iterable[_Union[Ended, _Mapping]]] = ..., cached: _Optional[_Iterable[_Union[Cached, _Mapping]]] = ...) -> None: ...

class Cached(_message.Message):
    __slots__ = ("stream", "num_tokens")
    STREAM_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    stream: int
    num_tokens: int
    def __init__(self, stream: _Optional[int] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class Logprobs(_message.Message):
    __slots__ = ("row", "logprob", "rank", "top_ids", "top_logprobs")
    ROW_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    row: int
    logprob: float
    rank: int
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, row: _Optional[int] = ..., logprob: _Optional[float] = ..., rank: _Optional[int] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class Ended(_message.Message):
    __slots__ = ("stream", "cancelled", "error_code", "error_message", "error_reason")
    STREAM_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ERROR_REASON_FIELD_NUMBER: _ClassVar[int]
    stream: int
    cancelled: bool
    error_code: str
    error_message: str
    error_reason: str
    def __init__(self, stream: _Optional[int] = ..., cancelled: bool = ..., error_code: _Optional[str] = ..., error_message: _Optional[str] = ..., error_reason: _Optional[str] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("state", "last_step_age_ms", "load", "adapters", "pace", "num_gateways")
    STATE_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    PACE_FIELD_NUMBER: _ClassVar[int]
    NUM_GATEWAYS_FIELD_NUMBER: _ClassVar[int]
    state: WorkerState
    last_step_age_ms: int
    load: Load
    adapters: _containers.RepeatedCompositeFieldContainer[AdapterPlace]
    pace: Pace
    num_gateways: int
    def __init__(self, state: _Optional[_Union[WorkerState, str]] = ..., last_step_age_ms: _Optional[int] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., adapters: _Optional[_Iterable[_Union[AdapterPlace, _Mapping]]] = ..., pace: _Optional[_Union[Pace, _Mapping]] = ..., num_gateways: _Optional[int] = ...) -> None: ...

class AdapterPlace(_message.Message):
    __slots__ = ("digest", "tier")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    digest: str
    tier: AdapterTier
    def __init__(self, digest: _Optional[str] = ..., tier: _Optional[_Union[AdapterTier, str]] = ...) -> None: ...

class Pace(_message.Message):
    __slots__ = ("step_s", "prompt_token_s", "seat_s", "host_load_s", "disk_load_s")
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    SEAT_S_FIELD_NUMBER: _ClassVar[int]
    HOST_LOAD_S_FIELD_NUMBER: _ClassVar[int]
    DISK_LOAD_S_FIELD_NUMBER: _ClassVar[int]
    step_s: float
    prompt_token_s: float
    seat_s: float
    host_load_s: float
    disk_load_s: float
    def __init__(self, step_s: _Optional[float] = ..., prompt_token_s: _Optional[float] = ..., seat_s: _Optional[float] = ..., host_load_s: _Optional[float] = ..., disk_load_s: _Optional[float] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("num_running", "num_waiting", "num_pages", "num_free_pages", "page_size", "num_uncomputed_tokens", "host_cache_usage")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_PAGES_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_UNCOMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HOST_CACHE_USAGE_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    num_pages: int
    num_free_pages: int
    page_size: int
    num_uncomputed_tokens: int
    host_cache_usage: float
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_pages: _Optional[int] = ..., num_free_pages: _Optional[int] = ..., page_size: _Optional[int] = ..., num_uncomputed_tokens: _Optional[int] = ..., host_cache_usage: _Optional[float] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerReport(_message.Message):
    __slots__ = ("worker_id", "generation", "state", "load", "device_adapters", "host_adapters", "counters", "num_registered_adapters", "last_step_age_ms", "uses")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    HOST_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    NUM_REGISTERED_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    generation: int
    state: WorkerState
    load: Load
    device_adapters: _containers.RepeatedScalarFieldContainer[str]
    host_adapters: _containers.RepeatedScalarFieldContainer[str]
    counters: EngineCounters
    num_registered_adapters: int
    last_step_age_ms: int
    uses: _containers.RepeatedCompositeFieldContainer[ModelUse]
    def __init__(self, worker_id: _Optional[str] = ..., generation: _Optional[int] = ..., state: _Optional[_Union[WorkerState, str]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., device_adapters: _Optional[_Iterable[str]] = ..., host_adapters: _Optional[_Iterable[str]] = ..., counters: _Optional[_Union[EngineCounters, _Mapping]] = ..., num_registered_adapters: _Optional[int] = ..., last_step_age_ms: _Optional[int] = ..., uses: _Optional[_Iterable[_Union[ModelUse, _Mapping]]] = ...) -> None: ...

class ModelUse(_message.Message):
    __slots__ = ("digest", "num_requests", "num_output_tokens", "output_tokens_per_s")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    digest: str
    num_requests: int
    num_output_tokens: int
    output_tokens_per_s: float
    def __init__(self, digest: _Optional[str] = ..., num_requests: _Optional[int] = ..., num_output_tokens: _Optional[int] = ..., output_tokens_per_s: _Optional[float] = ...) -> None: ...

class EngineCounters(_message.Message):
    __slots__ = ("num_steps", "num_prompt_tokens", "num_output_tokens", "num_preemptions", "num_adapter_loads", "num_slot_loads", "num_prefix_query_tokens", "num_prefix_hit_tokens")
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_ADAPTER_LOADS_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOT_LOADS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFIX_QUERY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFIX_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_steps: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_preemptions: int
    num_adapter_loads: int
    num_slot_loads: int
    num_prefix_query_tokens: int
    num_prefix_hit_tokens: int
    def __init__(self, num_steps: _Optional[int] = ..., num_prompt_tokens: _Optional[int] = ..., num_output_tokens: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., num_adapter_loads: _Optional[int] = ..., num_slot_loads: _Optional[int] = ..., num_prefix_query_tokens: _Optional[int] = ..., num_prefix_hit_tokens: _Optional[int] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("name", "digest", "version", "root", "parent", "created", "lora_rank", "text_digest", "vocab_size", "weight", "pin", "not_composable", "place", "allowed_roots", "unloaded")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    LORA_RANK_FIELD_NUMBER: _ClassVar[int]
    TEXT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    NOT_COMPOSABLE_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_ROOTS_FIELD_NUMBER: _ClassVar[int]
    UNLOADED_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    version: int
    root: str
    parent: str
    created: int
    lora_rank: int
    text_digest: str
    vocab_size: int
    weight: float
    pin: bool
    not_composable: str
    place: str
    allowed_roots: _containers.RepeatedScalarFieldContainer[str]
    unloaded: bool
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., version: _Optional[int] = ..., root: _Optional[str] = ..., parent: _Optional[str] = ..., created: _Optional[int] = ..., lora_rank: _Optional[int] = ..., text_digest: _Optional[str] = ..., vocab_size: _Optional[int] = ..., weight: _Optional[float] = ..., pin: bool = ..., not_composable: _Optional[str] = ..., place: _Optional[str] = ..., allowed_roots: _Optional[_Iterable[str]] = ..., unloaded: bool = ...) -> None: ...

class RegisterAdapterRequest(_message.Message):
    __slots__ = ("name", "version", "root", "parent", "created", "allowed_roots", "weight", "pin", "digest", "text_digest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_ROOTS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TEXT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    root: str
    parent: str
    created: int
    allowed_roots: _containers.RepeatedScalarFieldContainer[str]
    weight: float
    pin: bool
    digest: str
    text_digest: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., root: _Optional[str] = ..., parent: _Optional[str] = ..., created: _Optional[int] = ..., allowed_roots: _Optional[_Iterable[str]] = ..., weight: _Optional[float] = ..., pin: bool = ..., digest: _Optional[str] = ..., text_digest: _Optional[str] = ...) -> None: ...

class RegisterAdapterReply(_message.Message):
    __slots__ = ("adapter", "failure")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    failure: Failure
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "message", "reason")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    reason: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class UnregisterAdapterRequest(_message.Message):
    __slots__ = ("name", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class UnregisterAdapterReply(_message.Message):
    __slots__ = ("found", "device_bytes", "host_bytes")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    found: bool
    device_bytes: int
    host_bytes: int
    def __init__(self, found: bool = ..., device_bytes: _Optional[int] = ..., host_bytes: _Optional[int] = ...) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAdaptersReply(_message.Message):
    __slots__ = ("adapters", "names")
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    names: _containers.RepeatedCompositeFieldContainer[Adapter]
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ..., names: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ...) -> None: ...

class NoteAdaptersRequest(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ...) -> None: ...

class NoteAdaptersReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetUseRequest(_message.Message):
    __slots__ = ("digests", "cut_s")
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    CUT_S_FIELD_NUMBER: _ClassVar[int]
    digests: _containers.RepeatedScalarFieldContainer[str]
    cut_s: float
    def __init__(self, digests: _Optional[_Iterable[str]] = ..., cut_s: _Optional[float] = ...) -> None: ...

class GetUseReply(_message.Message):
    __slots__ = ("digests",)
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    digests: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, digests: _Optional[_Iterable[str]] = ...) -> None: ...

class GetFilesRequest(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: str
    def __init__(self, digest: _Optional[str] = ...) -> None: ...

class FileChunk(_message.Message):
    __slots__ = ("name", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    data: bytes
    def __init__(self, name: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("num_unfinished",)
    NUM_UNFINISHED_FIELD_NUMBER: _ClassVar[int]
    num_unfinished: int
    def __init__(self, num_unfinished: _Optional[int] = ...) -> None: ...
