"""Every error bon raises on purpose.

    BonError                      .retryable says whether the same call may succeed when it is made again
    ├── InputError                what the caller passed is wrong: exit code 2
    │   ├── UnknownNameError      a name that is not in a list of known ones; carries "did you mean"
    │   ├── PromptTooLongError    prompt (and completion) do not fit the model's context
    │   ├── ModelNotFoundError    a model that is not on disk and cannot be fetched
    │   └── UserCodeError         a function passed as policy or scorer raised, or returned something unusable
    ├── MissingExtraError         an optional package is not installed; the message has the command to type
    └── EngineError               a language model failed while it ran
        ├── UnavailableError      it cannot be reached, is overloaded, broke off or timed out: a retry may help
        └── RefusedError          it was reached and said no (key, rights, the request): a retry does not help

A message says what happened, with the offending value, and what to type next.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any


class BonError(Exception):
    """Base of all errors that bon raises on purpose."""

    retryable = False


class InputError(BonError):
    """What the caller passed is wrong; the message names the value, the place and the remedy.

    Args:
        message: see above.
        field: where in a request it is, as a path ("messages[0].content"), where that is known.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class UnknownNameError(InputError):
    """A name that is not in a list of known ones."""

    def __init__(self, what: str, name: object, known: Iterable[str]) -> None:
        names = sorted(known)
        close = difflib.get_close_matches(str(name), names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        super().__init__(f"unknown {what} {name!r}.{hint} Known: {', '.join(names) or 'none'}.")
        self.what, self.name, self.known = what, name, tuple(names)


class PromptTooLongError(InputError):
    """A prompt that does not fit the model's context.

    Args:
        tokens: length of the rendered prompt, in tokens.
        limit: tokens that the prompt may have (the model's context less one token for the answer).
        where: which prompt, for the message.
    """

    def __init__(self, tokens: int, limit: int, where: str = "the prompt") -> None:
        super().__init__(
            f"{where} has {tokens} tokens, {tokens - limit} more than the {limit} that fit this model's context. "
            "Shorten it, or use a model with a longer context."
        )
        self.tokens, self.limit = tokens, limit


class ModelNotFoundError(InputError):
    """A model that is neither on disk nor can be fetched."""


class UserCodeError(InputError):
    """A function that was passed in as policy or scorer raised, or returned something unusable."""


class MissingExtraError(BonError):
    """An optional package is missing."""

    def __init__(self, what: str, command: str) -> None:
        super().__init__(f"{what} is not installed. Type: {command}")
        self.command = command


class EngineError(BonError):
    """A language model failed while it ran."""


class UnavailableError(EngineError):
    """A model that cannot be reached, is overloaded, broke off or did not answer in time.

    Args:
        message: what happened, and where.
        retry_after: seconds that it asked to be left alone.
    """

    retryable = True

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RefusedError(EngineError):
    """A model's server was reached and refused the request, and would again."""


def whole_number(name: str, value: object, least: int) -> int:
    """Check a whole number.

    Raises:
        InputError: something else, or less than ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    return value


def number(name: str, value: object) -> float:
    """Check a number, which may be infinite.

    Raises:
        InputError: something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise InputError(f"{name} must be a number, got {value!r}.")
    return value


def several(what: str, value: Any) -> Iterable[Any]:
    """Check that there may be several of something; one text would be taken apart into its letters.

    Raises:
        InputError: it is one text, a mapping, or no list at all.
    """
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise InputError(f"{what}, not {value!r:.60}. Put it into a list.")
    return value


def user_error(what: str, error: Exception) -> BonError:
    """The error for what a function or an object of the caller's raised: bon's own as they are."""
    if isinstance(error, BonError):
        return error
    mapped = UserCodeError(f"{what} raised {type(error).__name__}: {error}")
    mapped.__cause__ = error
    return mapped
