"""One candidate's reconstructions, while they are made and after: bound, status, reward and cost."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import stdev

from bon.engines.base import Completion, Partial, Prompt
from bon.errors import EngineError, PromptTooLongError
from bon.scorers.base import Pending
from bon.scorers.flip.repeats import Repeats
from bon.scorers.parsing import Parsed, Parser
from bon.similarity import Bound, Match, Similarity, characters, mean_bound
from bon.types import REWARDED, Score, ScoreStatus, Usage, without_text

_LOOK_AGAIN = 16  # a text is read again when it has grown by this part of its length
_RUN = 4  # words: that many in a row are seldom the same in an instruction and in its answer by chance
_ECHO = 0.8  # share of such runs of a reconstruction above which it is a piece of the response


@dataclass(frozen=True, slots=True)
class FlipDetails:
    """What FLIP knows about a score beside the reward.

    Args:
        inferred: the instruction that backward inference arrived at (of several samples, the one nearest the mean).
        precision, recall: the parts of the F1.
        samples: rewards of the single reconstructions, when there are several.
        compared: what the F1 counts: "words", or "characters" for an instruction in a script without spaces.
    """

    inferred: str | None = None
    precision: float | None = None
    recall: float | None = None
    samples: tuple[float, ...] = ()
    compared: str = "words"


@dataclass
class Reconstruction:
    """One candidate's reconstructions, while they are made and after.

    ``keep`` may be called from an engine's thread while the event loop takes in completions, so both hold a lock.
    ``bounds[s]`` is what sample s can still reach, ``matches[s]`` what it did reach.
    """

    position: int
    pending: Pending
    prompt: Prompt
    parser: Parser
    similarity: Similarity
    samples: int
    first_sample: int = 0
    too_long: str = ""
    completions: dict[int, Completion] = field(default_factory=dict)
    parsed: dict[int, Parsed] = field(default_factory=dict)
    matches: dict[int, Match] = field(default_factory=dict)
    bounds: list[float] = field(default_factory=list)
    counters: list[Bound | None] = field(default_factory=list)
    repeats: list[Repeats] = field(default_factory=list)
    echoed: bool = False
    next_look: list[int] = field(default_factory=list)
    spent: Usage = field(default_factory=Usage)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        instruction = self.pending.task.instruction
        self.counters = [self.similarity.bound(instruction) for _ in range(self.samples)]
        self.bounds = [self.similarity.maximum] * self.samples
        self.repeats = [Repeats() for _ in range(self.samples)]
        self.next_look = [0] * self.samples

    def restarted(self) -> Reconstruction:
        """Another try with further samples, which remembers what was spent."""
        return Reconstruction(
            self.position,
            self.pending,
            self.prompt,
            self.parser,
            self.similarity,
            self.samples,
            self.first_sample + self.samples,
            spent=self.usage,
        )

    @property
    def prunable(self) -> bool:
        """Whether the text may ever say that the candidate cannot win."""
        return self.pending.group.prune and self.parser.settles and self.counters[0] is not None

    @property
    def stoppable(self) -> bool:
        """Whether another candidate's reward may ever say that this one is not needed."""
        return self.pending.group.stop_at is not None

    def keep(self, partial: Partial, stop: Iterable[str] = ()) -> bool:
        """Tighten the bound with what a sample has written so far; False when it repeats itself or cannot win."""
        sample = partial.sample_index - self.first_sample
        if self.repeats[sample].end(partial.text) is not None:
            return False  # before the bound sees words that ``finish`` will cut off
        counter, length = self.counters[sample], len(partial.text)
        settled = None
        if counter is not None and length >= self.next_look[sample]:
            self.next_look[sample] = length + length // _LOOK_AGAIN
            settled = self.parser.settled(before_stop(partial.text, stop))
        with self.lock:
            if counter is not None and settled is not None:
                self.bounds[sample] = counter.update(settled)
            return not self.pending.group.hopeless(self.upper_bound)

    def finish(self, completion: Completion) -> bool:
        """Take in a completion; True when it was the last one."""
        sample = completion.sample_index - self.first_sample
        parsed, match = None, None
        if completion.error is not None:
            parsed = Parsed("failed", None, str(completion.error))
            if isinstance(completion.error, PromptTooLongError):
                self.too_long = str(completion.error)
        elif (end := Repeats().end(completion.text)) is not None:
            parsed = self.parser.parse(completion.text[:end], "length", "the answer repeats itself")
        elif completion.finish_reason != "abort":
            parsed = self.parser.parse(completion.text, completion.finish_reason)
            if parsed.status == "failed" and not completion.text.strip():
                reason = without_text(completion.refusal, completion.reasoning, completion.finish_reason)
                parsed = Parsed("failed", None, reason)
        if parsed is not None and parsed.instruction is not None:
            match = self.similarity(parsed.instruction, self.pending.task.instruction)
            self.echoed |= echoes(parsed.instruction, self.pending.candidate.text)
        with self.lock:
            self.completions[sample] = completion
            if parsed is not None:
                self.parsed[sample] = parsed
            if match is not None:
                self.matches[sample] = match
        return len(self.completions) == self.samples

    @property
    def upper_bound(self) -> float:
        """The highest reward that the candidate can still reach."""
        if self.samples == 1 and not self.parsed:  # as nearly always, and asked every few tokens
            return min(self.similarity.maximum, self.bounds[0])
        unfinished = [bound for sample, bound in enumerate(self.bounds) if sample not in self.parsed]
        return min(self.similarity.maximum, mean_bound((m.f1 for m in self.matches.values()), unfinished))

    @property
    def status(self) -> ScoreStatus:
        """What to report: pruned if any sample was, else the worst of the samples that could be parsed."""
        if len(self.parsed) < len(self.completions):
            return "pruned"
        usable = [p.status for s, p in self.parsed.items() if s in self.matches]
        return "echo" if self.echoed else max(usable, key=REWARDED.index) if usable else "failed"

    @property
    def reward(self) -> float | None:
        """Mean similarity over the samples that could be parsed, without the last digit, which is rounding noise."""
        if self.status in ("pruned", "failed"):
            return None
        return round(math.fsum(m.f1 for m in self.matches.values()) / len(self.matches), 15)

    @property
    def usage(self) -> Usage:
        """Tokens spent so far."""
        done = self.completions.values()
        return self.spent + Usage(
            scorer_prompt_tokens=sum(c.prompt_tokens for c in done),
            scorer_completion_tokens=sum(c.completion_tokens for c in done),
            cached_tokens=sum(c.cached_tokens for c in done),
            drafted_tokens=sum(c.drafted_tokens for c in done),
        )

    def score(self, tie_break: float | None) -> Score:
        """Report, with the value that decides between equal rewards."""
        usage, status, reward = self.usage, self.status, self.reward
        if reward is None:
            bound = self.upper_bound if status == "pruned" else None
            errors = [c.error for c in self.completions.values() if isinstance(c.error, EngineError)]
            error = errors[0] if errors and status == "failed" else None
            return Score(None, status, self._reason(status), upper_bound=bound, usage=usage, error=error)
        nearest = min(self.matches, key=lambda s: (abs(self.matches[s].f1 - reward), s))
        inferred = self.parsed[nearest].instruction
        details = FlipDetails(
            inferred,
            precision=self._mean([m.precision for m in self.matches.values()]),
            recall=self._mean([m.recall for m in self.matches.values()]),
            samples=tuple(self.matches[s].f1 for s in sorted(self.matches)) if self.samples > 1 else (),
            compared=self.matches[nearest].compared,
        )
        reason, count = self._reason(status), len(self.matches)
        spread = stdev(details.samples) / math.sqrt(count) if count > 1 else None
        return Score(reward, status, reason, inferred, details=details, tie_break=tie_break, spread=spread, usage=usage)

    def _reason(self, status: ScoreStatus) -> str | None:
        group = self.pending.group
        if self.too_long:
            return f"the response does not fit the scorer: {self.too_long}"
        if status == "pruned":
            if group.reached:
                return "another candidate has reached the reward to stop at"
            best = "" if group.best_reward is None else f" ({group.best_reward:.3f})"
            return f"could not reach the best reward so far{best}"
        failed = [p.reason for p in self.parsed.values() if p.status == "failed"]
        if status == "failed":
            return failed[0] if failed else "there is no reconstruction"
        if failed:
            return f"{len(failed)} of {self.samples} reconstructions failed: {failed[0]}"
        return next((p.reason for p in self.parsed.values() if p.status == status and p.reason), None)

    @property
    def mean_logprob(self) -> float | None:
        """Log-probability per token of the reconstructions that count, None when the engine does not know it."""
        return self._mean([_per_token(c) for s, c in self.completions.items() if s in self.matches])

    @staticmethod
    def _mean(values: Sequence[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def _per_token(completion: Completion) -> float | None:
    if completion.cumulative_logprob is None or not completion.completion_tokens:
        return None
    return completion.cumulative_logprob / completion.completion_tokens


def echoes(inferred: str, response: str) -> bool:
    """Whether a reconstruction is a piece of the response: nearly all of its runs of words are."""
    inside = characters(inferred)
    size = min(_RUN, len(inside))
    runs, known = _runs(inside, size), {*_runs(characters(response), size)}
    return bool(size) and sum(run in known for run in runs) > _ECHO * len(runs)


def _runs(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [*zip(*(words[first:] for first in range(size)), strict=False)]


def before_stop(text: str, stop: Iterable[str]) -> str:
    """Cut off an end that may be the beginning of a stop string, which an engine would remove again."""
    for mark in stop:
        for length in range(min(len(mark), len(text)), 0, -1):
            if text.endswith(mark[:length]):
                text = text[:-length]
                break
    return text
