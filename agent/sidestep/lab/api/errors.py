"""What the API refuses, and how it says so: every refusal is a Kubernetes `Status` object with one clear line."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    406: "NotAcceptable",
    409: "Conflict",
    410: "Expired",
    413: "RequestEntityTooLarge",
    415: "UnsupportedMediaType",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with an object. `field` is a path like `spec.containers[0].env`; `reason` is one of
    Kubernetes' cause types: FieldValueRequired, FieldValueInvalid, FieldValueForbidden, FieldValueNotSupported."""

    field: str
    reason: str
    message: str


_WORDS = {
    "FieldValueRequired": "Required value",
    "FieldValueInvalid": "Invalid value",
    "FieldValueForbidden": "Forbidden",
    "FieldValueNotSupported": "Unsupported value",
    "FieldValueDuplicate": "Duplicate value",
}


class ApiError(Exception):
    """A refusal. `status()` is what goes over the wire."""

    def __init__(self, code: int, message: str, *, reason: str = "", details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason = reason or REASONS.get(code, "InternalError")
        self.details = details

    def status(self) -> dict[str, Any]:
        """The `Status` object."""
        body: dict[str, Any] = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        }
        if self.details is not None:
            body["details"] = self.details
        return body


def not_found(resource: str, group: str, name: str) -> ApiError:
    """404 for an object."""
    full = f"{resource}.{group}" if group else resource
    details = {"name": name, "group": group, "kind": resource}
    return ApiError(404, f'{full} "{name}" not found', details=details)


def exists(resource: str, group: str, name: str) -> ApiError:
    """409 for a second object of one name."""
    full = f"{resource}.{group}" if group else resource
    details = {"name": name, "group": group, "kind": resource}
    return ApiError(409, f'{full} "{name}" already exists', reason="AlreadyExists", details=details)


def conflict(resource: str, group: str, name: str, why: str) -> ApiError:
    """409 for a write that is based on an old object."""
    full = f"{resource}.{group}" if group else resource
    details = {"name": name, "group": group, "kind": resource}
    return ApiError(409, f'Operation cannot be fulfilled on {full} "{name}": {why}', details=details)


def invalid(kind: str, group: str, name: str, problems: Sequence[Problem]) -> ApiError:
    """422 that names the object and every field that is wrong."""
    full = f"{kind}.{group}" if group else kind
    lines = [f"{problem.field}: {_WORDS[problem.reason]}: {problem.message}" for problem in problems]
    text = lines[0] if len(lines) == 1 else "[" + ", ".join(lines) + "]"
    causes = [
        {
            "reason": problem.reason,
            "message": f"{_WORDS[problem.reason]}: {problem.message}",
            "field": problem.field,
        }
        for problem in problems
    ]
    details = {"name": name, "group": group, "kind": kind, "causes": causes}
    return ApiError(422, f'{full} "{name}" is invalid: {text}', details=details)


def gone(asked: int, oldest: int) -> ApiError:
    """410 for a watch that wants to start before the history does."""
    return ApiError(410, f"too old resource version: {asked} ({oldest})")
