"""Token credit: which sentences of the winner earn its reward. Each is left out once, and the rest is rated again.

The idea that a small edit shows which part of an answer earns the preference is that of fine-grained supervision (arXiv
2406.02756, of which only the abstract was at hand); there people edit and a model is trained, here nothing is. What
two sentences say both earns neither its credit, and credits need not add up to the reward.
"""

from __future__ import annotations

import re
from dataclasses import replace

from bon.errors import InputError
from bon.group import Group
from bon.pipeline import Pipeline
from bon.scorers.base import Scorer
from bon.scorers.parsing import strip_think
from bon.types import Candidate, Credit, Result, Score

MOST = 32
"""Parts of a text that are left out one by one; in a longer one neighbouring sentences go together."""

# Where a part ends: with its line, behind a sentence, or behind a sentence of a script without spaces.
_END = re.compile(
    r"""(?<!\s)\s*\n | [.!?…؟।]["'”’»)\]*_]*(?:\s*\n|[^\S\n]+) | [。！？｡]+[」』”’）】》]*(?:\s*\n|[^\S\n]*)""",
    re.VERBOSE,
)
_FENCED = re.compile(r"^ {0,3}(```|~~~).*?(?:^ {0,3}\1[^\n]*$|\Z)", re.MULTILINE | re.DOTALL)
# What a full stop does not end: the number of a list's item, an initial, an abbreviation.
_ABBREVIATED = re.compile(
    r"(?:^\W*\d+|\b(?:[^\W\d_]|Mr|Mrs|Ms|Dr|Prof|St|vs|Fig|approx|e\.g|i\.e|z\.B|bzw|ca))\Z", re.MULTILINE
)
_LONGEST = 12  # characters that are looked at for one of these
_WORD = re.compile(r"\w")


def refuse(scorer: Scorer) -> None:
    """Refuse a scorer that cannot rate a text which the policy did not sample.

    Raises:
        InputError: it goes by the policy's log-probabilities.
    """
    if scorer.needs.logprobs:
        raise InputError(
            f"{scorer.name} rates samples by what their policy gave each token, and a text without one of its "
            "sentences was not sampled: no sentence has a credit. Choose another scorer."
        )


async def credited(scorer: Scorer, result: Result, deadline: float | None = None) -> Result:
    """Return a result with the credit of each sentence of its winner, all of them rated in one call.

    A scorer that compares candidates sees the others as they are, the winner without one sentence among them, once for
    each sentence. What cannot be rated has a reason and no credit; ``Result.usage`` counts what it all cost.

    Args:
        scorer: what rewarded the result, with its models in place.
        result: what is known.
        deadline: seconds after which the sentences that are not yet rated get no credit.

    Raises:
        InputError: the scorer cannot rate a text that was not sampled.
    """
    refuse(scorer)
    winner, reward = result.best_candidate, result.reward
    if winner is None or reward is None:
        return replace(result, credit=(), warnings=(*result.warnings, "no credit: there is no winner with a reward."))
    spans = parts(winner.text)
    if len(spans) < 2:
        alone = "no credit: the winner is one sentence, and without it nothing is left to rate."
        return replace(result, credit=(), warnings=(*result.warnings, alone))
    groups = [_without(span, result, winner, scorer.needs.group) for span in spans]
    await Pipeline(scorer, settle=False).run(groups, deadline)
    found = [_credit(span, winner, reward, group) for span, group in zip(spans, groups, strict=True)]
    return replace(result, credit=tuple(found), usage=sum((group.usage for group in groups), result.usage))


def parts(text: str) -> list[tuple[int, int]]:
    """Divide a text into sentences, lines and blocks of code, with the white space behind each.

    Returns:
        (start, end) in characters, at most ``MOST``, which leave nothing out but thinking. What has no letter and no
        digit belongs to the part behind it, and at the end to the last one.
    """
    said = strip_think(text)
    first = at = len(text) - len(said) if text.endswith(said) else 0
    fenced = [match.span() for match in _FENCED.finditer(text)]
    ends: list[int] = []
    begun = False  # whether there is a word since the last end
    for match in _END.finditer(text, first):
        begun, at = begun or _WORD.search(text, at, match.end()) is not None, match.end()
        if begun and not any(start < at < end for start, end in fenced) and not _goes_on(text, match):
            ends.append(at)
            begun = False
    if begun or not ends or _WORD.search(text, at):
        ends.append(len(text))
    ends[-1] = len(text)
    count = min(MOST, len(ends))
    ends = [ends[(place + 1) * len(ends) // count - 1] for place in range(count)]
    return list(zip([first, *ends], ends, strict=False))


def _goes_on(text: str, match: re.Match[str]) -> bool:
    """Whether what looks like the end of a sentence is within one."""
    if "\n" in match[0] or match[0][0] not in ".…":
        return False
    before = max(0, match.start() - _LONGEST)
    return text[match.end() : match.end() + 1].islower() or _ABBREVIATED.search(text, before, match.start()) is not None


def _without(span: tuple[int, int], result: Result, winner: Candidate, whole: bool) -> Group:
    """The group of a result with its winner short of a part; the others only where the scorer looks at them."""
    text = (winner.text[: span[0]] + winner.text[span[1] :]).rstrip()
    unknown = {"tokens": None, "cumulative_logprob": None, "logprobs": None, "completion_tokens": None}
    short = replace(winner, text=text, top_logprobs=(), **unknown)  # type: ignore[arg-type]
    group = Group(result.task, whole=whole)
    group.ask(len(result.candidates))
    for candidate in result.candidates:
        if candidate is winner or whole:
            group.admit(short if candidate is winner else candidate, sampled=False)
    return group


def _credit(span: tuple[int, int], winner: Candidate, reward: float, group: Group) -> Credit:
    part = winner.text[slice(*span)]
    text, start = part.strip(), span[0] + len(part) - len(part.lstrip())
    failed = Score(None, "failed", str(group.error))
    score = next((score for score in group.scores if score.candidate == winner.index), failed)
    if score.reward is not None:
        return Credit(start, start + len(text), text, reward - score.reward)
    reason = "the deadline passed first" if score.status == "late" else score.reason
    return Credit(start, start + len(text), text, None, reason)
