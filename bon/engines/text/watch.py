"""The text of one completion while its tokens come: where it ends, and what it is then.

Used by every engine that decodes tokens itself, so that stop strings and ``keep`` mean the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from bon.engines.base import Keep, Partial
from bon.engines.text.render import Renderer, TextStream
from bon.types import FinishReason

KEEP_EVERY = 4
"""Tokens between two calls of ``keep`` for one completion."""


class Watch:
    """Looks at a growing completion for stop strings, and asks ``keep`` every ``KEEP_EVERY`` tokens.

    Args:
        renderer: decodes.
        request_index, sample_index: which completion, for ``keep``.
        stop: strings at which it ends.
        keep: see ``Generates.generate``.
    """

    __slots__ = ("_index", "_keep", "_sample", "_stop", "_stream")

    def __init__(
        self, renderer: Renderer, request_index: int, sample_index: int, stop: Sequence[str], keep: Keep | None
    ) -> None:
        self._stream = TextStream(renderer)
        self._index, self._sample, self._stop, self._keep = request_index, sample_index, stop, keep

    @property
    def count(self) -> int:
        """Tokens pushed so far."""
        return self._stream.count

    @property
    def partial(self) -> Partial:
        """What ``keep`` is asked about."""
        return Partial(self._index, self._sample, self._stream.text, self._stream.count)

    def push(self, ids: Sequence[int], *, ended: bool = False, ask: bool = False) -> tuple[FinishReason, str] | None:
        """Add tokens; say why the completion is over and what its text is, or None when it goes on.

        Args:
            ids: tokens behind those that were pushed before, end tokens left out.
            ended: the completion has ended by itself, so ``keep`` is not asked.
            ask: whether it is time to ask ``keep``.
        """
        before = len(self._stream.text)
        text = self._stream.push(ids)
        hits = [at for stop in self._stop if (at := text.find(stop, max(0, before - len(stop) + 1))) >= 0]
        if hits:
            return "stop", text[: min(hits)]
        if ended or not ask or self._keep is None:
            return None
        return None if self._keep(self.partial) else ("abort", text)
