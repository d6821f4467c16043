"""Where a growing text begins to say the same again and again, as a model does that has lost its way."""

from __future__ import annotations

_RUN = 40  # characters: more than the lines of a list tend to have in common
_TIMES = 5


class Repeats:
    """Looks for a run of characters that stands in a text five times, none overlapping another.

    Where it is found depends on the text alone, and not on how often it was looked at while it grew.
    """

    def __init__(self) -> None:
        self._at = 0
        self._seen: dict[str, tuple[int, int]] = {}  # run -> how often, and where it may stand next
        self._end: int | None = None

    def end(self, text: str) -> int | None:
        """How much of ``text`` there was when it had repeated itself; None while it has not.

        Args:
            text: begins with that of the call before.
        """
        while self._end is None and self._at + _RUN <= len(text):
            run = text[self._at : self._at + _RUN]
            times, free = self._seen.get(run, (0, 0))
            if self._at >= free:
                self._seen[run] = times + 1, self._at + _RUN
                self._end = self._at + _RUN if times + 1 == _TIMES else None
            self._at += 1
        return self._end
