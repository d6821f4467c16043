"""Whether it pays to hand the original instruction to the engine as a draft of its own reconstruction.

A good candidate's reconstruction begins with the very words of the instruction, and often is the instruction. An engine
that reads those words along with the response (``Prompt.draft``) has them in one pass instead of one for each token,
and knows at once which candidates are perfect; the outcome is the same. Where a scorer rarely finds the words, reading
them costs more than it saves: whether they are found is learnt from the reconstructions as they come. An engine whose
batch is full (``bon.engines.base.Batches``) is handed no drafts: it has nothing idle to read them with.
"""

from __future__ import annotations

from bon.engines.base import Completion

_WORTH_IT = 0.4  # share of a reconstruction that must be drafted: reading a token may cost what decoding it does
_TRIAL = 16  # reconstructions by which a scorer is judged first
_MEMORY = 128  # reconstructions over which that share is averaged
_AGAIN = 32  # reconstructions between two tries once it is too low


class Drafting:
    """Decides for each reconstruction, and learns from each.

    Args:
        wanted: False never drafts.
    """

    def __init__(self, wanted: bool = True) -> None:
        self._wanted = wanted
        self._share = 0.0
        self._asked = self._learned = 0

    def pays(self) -> bool:
        """Whether the next reconstruction gets a draft: some at first, all once drafts are taken, else now and then."""
        self._asked += 1
        pays = self._share >= _WORTH_IT if self._learned >= _TRIAL else self._asked <= _TRIAL
        return self._wanted and (pays or self._asked % _AGAIN == 0)

    def learn(self, completion: Completion) -> None:
        """Note how much of a reconstruction that had a draft came from it."""
        if completion.completion_tokens:
            self._learned += 1
            share = completion.drafted_tokens / completion.completion_tokens
            self._share += (share - self._share) / min(self._learned, _MEMORY)

    def restarted(self) -> Drafting:
        """The same for another model, of which nothing is known yet."""
        return Drafting(self._wanted)
