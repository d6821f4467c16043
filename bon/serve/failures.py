"""Every error in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.responses import Response

from bon import errors

# Not the client's fault, and no model answers until somebody has done something about it.
BROKEN = (errors.EngineError, errors.ModelNotFoundError, errors.MissingExtraError)
RETRY_AFTER_S = 5  # where the model's server does not say
_ADDRESS = re.compile(r"https?://[^\s,;)'\"]*[^\s,;:.)'\"]")
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error to be sent to a client.

    Args:
        status: HTTP status.
        message: what happened, and what to do.
        code: for programs.
        param: the request field that is at fault, as a path.
        headers: more response headers.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The HTTP response."""
        return json_response(self.body, self.status, self.headers)


class ClientGone(Exception):  # noqa: N818
    """The client closed the connection; its work has been aborted."""


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON as bytes, encoded once."""
    return Response(orjson.dumps(body), status, dict(headers or {}), media_type="application/json")


def bad(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """Make a 400 that names a field."""
    return ApiError(400, f"{param}: {message}" if not message.startswith(param) else message, code, param)


def api_error(error: BaseException, passed: Mapping[str, Any] | None = None) -> ApiError:
    """The error that the client gets for what a run raised.

    Args:
        error: what was raised.
        passed: request fields that were handed on to the policy's engine: where that refuses one, it is named.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, errors.PromptTooLongError):
        return ApiError(400, str(error), "context_length_exceeded", "messages")
    if isinstance(error, errors.RefusedError):  # official clients do not repeat what carries this header
        return ApiError(502, _unplaced(error), "refused_upstream", headers={"x-should-retry": "false"})
    if isinstance(error, BROKEN):
        about = f": {_unplaced(error)}" if isinstance(error, errors.EngineError) else "; the log has the details."
        wait = error.retry_after if isinstance(error, errors.UnavailableError) else None
        headers = {"retry-after": str(math.ceil(RETRY_AFTER_S if wait is None else max(wait, 1)))}
        return ApiError(503, f"a model of this server failed{about}", "engine_error", headers=headers)
    if isinstance(error, errors.InputError) and not isinstance(error, errors.UserCodeError):
        if error.field is not None:
            return bad(error.field, str(error))
        name = str(error.name) if isinstance(error, errors.UnknownNameError) else None
        if passed:
            name = name if name in passed else next(iter(passed))
            return ApiError(400, f"{name}: the policy cannot honour this field: {error}", "unsupported_parameter", name)
        return ApiError(400, str(error), "invalid_value", name)
    return ApiError(500, "the server failed on this request; its log has the details.", "internal_error")


def _unplaced(error: errors.BonError) -> str:
    """What an error says, without the address of a server behind this one: that is none of the client's business."""
    about_server = isinstance(error, errors.UnavailableError | errors.RefusedError)
    return _ADDRESS.sub("the model's server", str(error)) if about_server else str(error)
