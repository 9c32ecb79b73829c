"""All errors a caller can meet, and the one table that maps them to gRPC, HTTP and OpenAI.

Raise these for a caller's mistake or an outside failure, with a message that names the value, the limit and the
next step. A bug of ours is an ``assert`` and ends as `InternalError`.

Owns: the exception types and the table. Leaves to others: HTTP rendering (gateway/api/errors.py), gRPC
(server/service.py). Imports only the standard library.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import ClassVar, Final, Self

MAX_QUOTED_CHARS: Final = 200
_MAX_QUOTED_BITS: Final = 600  # the largest integer written out, some 180 digits; Python refuses 4,300

_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxtuple, _short.maxdict, _short.maxset = 3, 8, 8, 8, 8
_short.maxstring = _short.maxlong = _short.maxother = MAX_QUOTED_CHARS


def cut(text: str) -> str:
    """Return a caller's text cut to `MAX_QUOTED_CHARS` for a message."""
    return text if len(text) <= MAX_QUOTED_CHARS else f"{text[:MAX_QUOTED_CHARS]}..."


def quoted(value: object) -> str:
    """Return `repr(value)` for a message, with its length and its cost bounded."""
    if isinstance(value, str | bytes):
        return cut(repr(value)) if len(value) <= MAX_QUOTED_CHARS else f"{value[:MAX_QUOTED_CHARS]!r}..."
    if isinstance(value, int) and value.bit_length() > _MAX_QUOTED_BITS:
        return f"an integer of {value.bit_length()} bits"
    try:
        return cut(_short.repr(value))
    except Exception:  # the caller's object may raise anything
        return f"an object of the type {type(value).__name__}"


class LoRAFleetError(Exception):
    """Base of all named errors.

    message: for the caller, in complete sentences. param: the request field at fault, if any.
    """

    retry_after_s: ClassVar[float | None] = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword arguments do not survive pickling by default, and Ray pickles them.
        return _rebuild, (type(self), self.message, self.param, dict(self.__dict__))


def _rebuild(kind: type[LoRAFleetError], message: str, param: str | None, state: dict[str, object]) -> LoRAFleetError:
    error = kind.__new__(kind)
    LoRAFleetError.__init__(error, message, param=param)
    error.__dict__.update(state)
    return error


class InvalidRequestError(LoRAFleetError):
    """A field is missing, of the wrong type, out of range or not supported."""


class ContextLengthError(InvalidRequestError):
    """Prompt and requested tokens do not fit into the model's context."""

    @classmethod
    def beyond(cls, max_model_len: int, problem: str, *, param: str = "prompt") -> Self:
        """Return the error for a context of `max_model_len` tokens, in the words by which clients recognise it."""
        return cls(f"This model's maximum context length is {max_model_len} tokens. {problem}", param=param)


class AuthenticationError(LoRAFleetError):
    """The API key is missing or unknown."""


class PermissionDeniedError(LoRAFleetError):
    """The API key is valid but does not permit this."""


class NotFoundError(LoRAFleetError):
    """The path or object does not exist."""


class MethodNotAllowedError(LoRAFleetError):
    """The path exists but does not support the HTTP method."""


class UnknownModelError(LoRAFleetError):
    """`model` names neither the base model nor an adapter."""


class AdapterConflictError(LoRAFleetError):
    """A name or id is taken by another adapter."""


class BodyTooLargeError(LoRAFleetError):
    """The HTTP body exceeds the limit."""


class AdapterRefusedError(LoRAFleetError):
    """An adapter cannot be applied in full.

    reason: a stable code such as ``rank_too_large``, for programs; the message is for people.
    """

    def __init__(self, message: str, *, reason: str, param: str | None = "model") -> None:
        super().__init__(message, param=param)
        self.reason = reason


class AdapterUnavailableError(LoRAFleetError):
    """An adapter that was valid when registered cannot be loaded now (file gone, changed, unreadable)."""

    retry_after_s = 5.0


class QueueFullError(LoRAFleetError):
    """The waiting queue is full."""

    retry_after_s = 1.0


class WorkerUnavailableError(LoRAFleetError):
    """No worker can take the request now."""

    retry_after_s = 2.0


class WorkerLostError(LoRAFleetError):
    """The worker that ran the request died before the request ended."""

    retry_after_s = 2.0


class DrainingError(LoRAFleetError):
    """The process is shutting down and takes no new requests."""

    retry_after_s = 5.0


class DeadlineError(LoRAFleetError):
    """The request did not end within its time limit."""


class NonFiniteLogitsError(LoRAFleetError):
    """The model gave NaN or infinity for this request: broken base or adapter weights."""


class InternalError(LoRAFleetError):
    """A bug of ours; the details are in the log under the request id."""


class ConfigError(LoRAFleetError):
    """A flag or configuration value is wrong or contradicts another one."""


class ModelError(LoRAFleetError):
    """The base model's files are missing, broken or of an unsupported kind."""


class NoRoomError(ConfigError):
    """The Ray cluster has too few CPUs or GPUs for the requested ranks."""


class MemoryPlanError(ConfigError):
    """Weights, KV pages and adapter slots do not fit into memory."""


@dataclass(frozen=True, slots=True)
class ErrorStatus:
    """One error's code and status, for each protocol."""

    code: str  # stable; travels in the `code` field of HTTP errors and of gRPC terminal events
    grpc: str  # name of a grpc.StatusCode
    http: int
    openai_type: str


ERRORS: dict[type[LoRAFleetError], ErrorStatus] = {
    InvalidRequestError: ErrorStatus("invalid_request", "INVALID_ARGUMENT", 400, "invalid_request_error"),
    ContextLengthError: ErrorStatus("context_length_exceeded", "INVALID_ARGUMENT", 400, "invalid_request_error"),
    AuthenticationError: ErrorStatus("invalid_api_key", "UNAUTHENTICATED", 401, "authentication_error"),
    PermissionDeniedError: ErrorStatus("permission_denied", "PERMISSION_DENIED", 403, "permission_error"),
    NotFoundError: ErrorStatus("not_found", "NOT_FOUND", 404, "invalid_request_error"),
    MethodNotAllowedError: ErrorStatus("method_not_allowed", "UNIMPLEMENTED", 405, "invalid_request_error"),
    UnknownModelError: ErrorStatus("model_not_found", "NOT_FOUND", 404, "invalid_request_error"),
    AdapterConflictError: ErrorStatus("adapter_conflict", "ALREADY_EXISTS", 409, "invalid_request_error"),
    BodyTooLargeError: ErrorStatus("body_too_large", "INVALID_ARGUMENT", 413, "invalid_request_error"),
    AdapterRefusedError: ErrorStatus("adapter_refused", "FAILED_PRECONDITION", 422, "invalid_request_error"),
    AdapterUnavailableError: ErrorStatus("adapter_unavailable", "UNAVAILABLE", 503, "server_error"),
    QueueFullError: ErrorStatus("queue_full", "RESOURCE_EXHAUSTED", 429, "rate_limit_error"),
    WorkerUnavailableError: ErrorStatus("no_worker", "UNAVAILABLE", 503, "server_error"),
    WorkerLostError: ErrorStatus("worker_lost", "UNAVAILABLE", 503, "server_error"),
    DrainingError: ErrorStatus("draining", "UNAVAILABLE", 503, "server_error"),
    DeadlineError: ErrorStatus("deadline_exceeded", "DEADLINE_EXCEEDED", 504, "server_error"),
    NonFiniteLogitsError: ErrorStatus("non_finite_logits", "INTERNAL", 500, "server_error"),
    InternalError: ErrorStatus("internal_error", "INTERNAL", 500, "server_error"),
    ConfigError: ErrorStatus("bad_config", "FAILED_PRECONDITION", 500, "server_error"),
    ModelError: ErrorStatus("bad_model", "FAILED_PRECONDITION", 500, "server_error"),
    NoRoomError: ErrorStatus("no_room", "FAILED_PRECONDITION", 500, "server_error"),
    MemoryPlanError: ErrorStatus("memory_plan", "FAILED_PRECONDITION", 500, "server_error"),
}

_BY_CODE = {status.code: kind for kind, status in ERRORS.items()}


def status_of(error: BaseException) -> ErrorStatus:
    """Return the table's row for `error`; an unknown type counts as `InternalError`."""
    return ERRORS.get(type(error), ERRORS[InternalError])  # type: ignore[arg-type]


def error_from_code(code: str, message: str, *, reason: str = "") -> LoRAFleetError:
    """Return the exception for the `code` another process sent."""
    kind = _BY_CODE.get(code, InternalError)
    if kind is AdapterRefusedError:
        return AdapterRefusedError(message, reason=reason or "unknown")
    return kind(message)
