from lorafleet.proto import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WatchRequest(_message.Message):
    __slots__ = ("gateway_id", "fleet", "adapters")
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    FLEET_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    fleet: str
    adapters: _containers.RepeatedCompositeFieldContainer[_worker_pb2.Adapter]
    def __init__(self, gateway_id: _Optional[str] = ..., fleet: _Optional[str] = ..., adapters: _Optional[_Iterable[_Union[_worker_pb2.Adapter, _Mapping]]] = ...) -> None: ...

class RoutingTable(_message.Message):
    __slots__ = ("incarnation", "version", "base", "adapters", "workers", "fleet", "unloaded")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    FLEET_FIELD_NUMBER: _ClassVar[int]
    UNLOADED_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    version: int
    base: BaseModel
    adapters: _containers.RepeatedCompositeFieldContainer[_worker_pb2.Adapter]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerEndpoint]
    fleet: str
    unloaded: _containers.RepeatedCompositeFieldContainer[_worker_pb2.Adapter]
    def __init__(self, incarnation: _Optional[str] = ..., version: _Optional[int] = ..., base: _Optional[_Union[BaseModel, _Mapping]] = ..., adapters: _Optional[_Iterable[_Union[_worker_pb2.Adapter, _Mapping]]] = ..., workers: _Optional[_Iterable[_Union[WorkerEndpoint, _Mapping]]] = ..., fleet: _Optional[str] = ..., unloaded: _Optional[_Iterable[_Union[_worker_pb2.Adapter, _Mapping]]] = ...) -> None: ...

class BaseModel(_message.Message):
    __slots__ = ("names", "root", "created", "tokenizer_digest", "max_model_len", "vocab_size")
    NAMES_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    root: str
    created: int
    tokenizer_digest: str
    max_model_len: int
    vocab_size: int
    def __init__(self, names: _Optional[_Iterable[str]] = ..., root: _Optional[str] = ..., created: _Optional[int] = ..., tokenizer_digest: _Optional[str] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ...) -> None: ...

class WorkerEndpoint(_message.Message):
    __slots__ = ("worker_id", "generation", "address", "state", "max_num_seqs", "max_loras", "num_ranks", "lacking")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    MAX_LORAS_FIELD_NUMBER: _ClassVar[int]
    NUM_RANKS_FIELD_NUMBER: _ClassVar[int]
    LACKING_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    generation: int
    address: str
    state: _worker_pb2.WorkerState
    max_num_seqs: int
    max_loras: int
    num_ranks: int
    lacking: _containers.RepeatedCompositeFieldContainer[LackingAdapter]
    def __init__(self, worker_id: _Optional[str] = ..., generation: _Optional[int] = ..., address: _Optional[str] = ..., state: _Optional[_Union[_worker_pb2.WorkerState, str]] = ..., max_num_seqs: _Optional[int] = ..., max_loras: _Optional[int] = ..., num_ranks: _Optional[int] = ..., lacking: _Optional[_Iterable[_Union[LackingAdapter, _Mapping]]] = ...) -> None: ...

class LackingAdapter(_message.Message):
    __slots__ = ("name", "digest", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    reason: str
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class LoadAdapterRequest(_message.Message):
    __slots__ = ("name", "root", "load_inplace", "weight", "pin")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    LOAD_INPLACE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    name: str
    root: str
    load_inplace: bool
    weight: float
    pin: bool
    def __init__(self, name: _Optional[str] = ..., root: _Optional[str] = ..., load_inplace: bool = ..., weight: _Optional[float] = ..., pin: bool = ...) -> None: ...

class UnloadAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class PingRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PingReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FleetStatus(_message.Message):
    __slots__ = ("incarnation", "version", "num_adapters", "workers")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    version: int
    num_adapters: int
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    def __init__(self, incarnation: _Optional[str] = ..., version: _Optional[int] = ..., num_adapters: _Optional[int] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("name", "state", "num_ranks", "num_starts", "report", "report_age_s", "max_num_seqs", "max_loras", "lacking")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    NUM_RANKS_FIELD_NUMBER: _ClassVar[int]
    NUM_STARTS_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    REPORT_AGE_S_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    MAX_LORAS_FIELD_NUMBER: _ClassVar[int]
    LACKING_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: str
    num_ranks: int
    num_starts: int
    report: _worker_pb2.WorkerReport
    report_age_s: float
    max_num_seqs: int
    max_loras: int
    lacking: _containers.RepeatedCompositeFieldContainer[LackingAdapter]
    def __init__(self, name: _Optional[str] = ..., state: _Optional[str] = ..., num_ranks: _Optional[int] = ..., num_starts: _Optional[int] = ..., report: _Optional[_Union[_worker_pb2.WorkerReport, _Mapping]] = ..., report_age_s: _Optional[float] = ..., max_num_seqs: _Optional[int] = ..., max_loras: _Optional[int] = ..., lacking: _Optional[_Iterable[_Union[LackingAdapter, _Mapping]]] = ...) -> None: ...

class AdapterUpdate(_message.Message):
    __slots__ = ("failure", "incarnation", "version", "device_bytes", "host_bytes", "num_draining")
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAINING_FIELD_NUMBER: _ClassVar[int]
    failure: _worker_pb2.Failure
    incarnation: str
    version: int
    device_bytes: int
    host_bytes: int
    num_draining: int
    def __init__(self, failure: _Optional[_Union[_worker_pb2.Failure, _Mapping]] = ..., incarnation: _Optional[str] = ..., version: _Optional[int] = ..., device_bytes: _Optional[int] = ..., host_bytes: _Optional[int] = ..., num_draining: _Optional[int] = ...) -> None: ...
