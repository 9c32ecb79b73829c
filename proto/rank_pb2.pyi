from lorafleet.proto import worker_pb2 as _worker_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AttendRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RankAdapter(_message.Message):
    __slots__ = ("digest", "path")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    digest: str
    path: str
    def __init__(self, digest: _Optional[str] = ..., path: _Optional[str] = ...) -> None: ...

class StageRequest(_message.Message):
    __slots__ = ("digest", "slot", "number", "norms", "path")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    NORMS_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    digest: str
    slot: int
    number: int
    norms: bytes
    path: str
    def __init__(self, digest: _Optional[str] = ..., slot: _Optional[int] = ..., number: _Optional[int] = ..., norms: _Optional[bytes] = ..., path: _Optional[str] = ...) -> None: ...

class SquaresReply(_message.Message):
    __slots__ = ("failure", "squares")
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    SQUARES_FIELD_NUMBER: _ClassVar[int]
    failure: _worker_pb2.Failure
    squares: bytes
    def __init__(self, failure: _Optional[_Union[_worker_pb2.Failure, _Mapping]] = ..., squares: _Optional[bytes] = ...) -> None: ...

class RankReply(_message.Message):
    __slots__ = ("failure",)
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    failure: _worker_pb2.Failure
    def __init__(self, failure: _Optional[_Union[_worker_pb2.Failure, _Mapping]] = ...) -> None: ...
