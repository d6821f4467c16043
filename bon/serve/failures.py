"""Every error in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from bon import errors
from bon.data.sink import to_json
from bon.engines.http.wire import RequestRefusedError

# Not the client's fault, and no model answers until somebody has done something about it.
BROKEN = (errors.EngineError, errors.ModelNotFoundError, errors.MissingExtraError)
RETRY_AFTER_S = 5  # where the model's server does not say
_ADDRESS = re.compile(r"https?://[^\s,;)'\"]*[^\s,;:.)'\"]|\b\d{1,3}(?:\.\d{1,3}){3}\b(?::\d+)?")
_FOLDER = re.compile(r"(?<![\w/.<:])/(?:[\w.+@-]+/)+([\w.+@-]*)")
_KEY = re.compile(r"\b(?:sk|pk|rk|hf|gsk|xai|nvapi)[-_][\w*.-]+|(?<!\S)[^\s*]*\*{3}\S*")
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
    """A response of JSON."""
    return Response(to_json(body), status, dict(headers or {}), media_type="application/json")


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
    if isinstance(error, ClientGone):  # for the log; nobody reads it
        return ApiError(499, "the client closed the connection.", "client_gone")
    if isinstance(error, errors.PromptTooLongError):
        return ApiError(400, public(str(error)), "context_length_exceeded", "messages")
    if isinstance(error, errors.RefusedError):  # official clients do not repeat what carries this header
        return ApiError(502, _told(error), "refused_upstream", headers={"x-should-retry": "false"})
    if isinstance(error, BROKEN):
        wait = error.retry_after if isinstance(error, errors.UnavailableError) else None
        headers = {"retry-after": str(math.ceil(RETRY_AFTER_S if wait is None else max(wait, 1)))}
        return ApiError(503, _told(error), "engine_error", headers=headers)
    if isinstance(error, errors.InputError) and not isinstance(error, errors.UserCodeError):
        if error.field is not None:
            return bad(error.field, public(str(error)))
        name = str(error.name) if isinstance(error, errors.UnknownNameError) else None
        if passed:
            why = "" if name in passed else f" {public(str(error))}"  # what else there is, is the operator's to know
            name = name if name in passed else next(iter(passed))
            return ApiError(400, f"{name}: the policy cannot honour this field.{why}", "unsupported_parameter", name)
        return ApiError(400, public(str(error)), "invalid_value", name)
    return ApiError(500, "the server failed on this request; its log has the details.", "internal_error")


def _told(error: errors.BonError) -> str:
    """What a client may know of a model's failure: what is wrong with its request, else only that there is one."""
    if isinstance(error, RequestRefusedError) and getattr(error.__cause__, "status", 400) in (400, 413, 422):
        return public(str(error))
    if isinstance(error, errors.RefusedError):
        return "the model's server refuses what this server asks of it; the log has the details."
    if isinstance(error, errors.UnavailableError):
        wait = "" if error.retry_after is None else f" and asks to wait {error.retry_after:g} s"
        return f"a model of this server does not answer{wait}; the log has the details."
    return "a model of this server failed; the log has the details."


def public(text: str) -> str:
    """A text without addresses of servers behind this one, folders and keys: they are none of the client's business."""
    return _FOLDER.sub(r"\1", _ADDRESS.sub("the model's server", _KEY.sub("***", text)))
