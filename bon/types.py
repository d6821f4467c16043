"""The values that travel along the data path behind the task, in the order in which they appear.

    Task ─▶ (sample) ─▶ Candidate ─▶ (score) ─▶ Score ─▶ (select) ─▶ Selection ─▶ Result

All are frozen. A fact that can be derived is a property. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from bon.errors import BonError, InputError, UnknownNameError
from bon.task import Task

FinishReason = Literal["stop", "length", "abort", "error"]
ScoreStatus = Literal["ok", "repaired", "fallback", "echo", "failed", "empty", "pruned", "late"]
_STATUSES: tuple[ScoreStatus, ...] = get_args(ScoreStatus)
REWARDED = _STATUSES[:4]
"""Statuses of a score that has a reward, from the best to the worst."""
NO_LIMIT = 2**31 - 1  # tokens
_SHOWN = 80  # characters of a text in a repr


class Drawing(NamedTuple):
    """How one token is drawn, for engines that draw tokens themselves; the defaults change nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are sampled; the names and meanings are vLLM's.

    Of temperature, top_p, top_k and min_p None means "not said": a server behind HTTP is sent nothing and applies its
    own defaults, and an engine in this process takes those of the model's generation_config.json, or of ``Drawing``.

    Args:
        temperature: 0 decodes greedily.
        top_p: nucleus mass, in (0, 1].
        top_k: keep the k likeliest tokens; 0 or -1 keeps all.
        min_p: drop tokens whose probability is below min_p times the likeliest one's.
        max_tokens: tokens of one completion at most, -1 for no limit; the room left in the context bounds it as well.
        stop: strings at which a completion ends; they are not part of its text.
        seed: the same seed, prompt and sample index give the same completion, whatever else is in the batch; None or -1
            draws anew.
        logprobs: whether the log-probability of each sampled token is wanted. Where it costs something (vLLM, HTTP)
            it is left out otherwise; the torch engine has it in any case.
        top_logprobs: how many of the likeliest tokens at each place are wanted, with ``logprobs``; servers behind HTTP
            tell them (20 at most, mostly), other engines do not.
        extra: options of one engine under that engine's own names; an engine refuses those it does not know.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_tokens: int = 1024
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, meant in _MINUS_ONE.items():
            if getattr(self, name) == -1:
                object.__setattr__(self, name, meant)
        _require("temperature", self.temperature, float, lambda v: v >= 0, "a number >= 0", or_none=True)
        _require("top_p", self.top_p, float, lambda v: 0 < v <= 1, "a number in (0, 1]", or_none=True)
        _require("top_k", self.top_k, int, lambda v: v >= 0, "a whole number >= 0 (0 keeps every token)", or_none=True)
        _require("min_p", self.min_p, float, lambda v: 0 <= v <= 1, "a number in [0, 1]", or_none=True)
        _require("max_tokens", self.max_tokens, int, lambda v: v >= 1, "a whole number >= 1")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise InputError(f"stop must be one or several texts that are not empty, got {self.stop!r}.")
        _require("seed", self.seed, int, lambda v: v >= 0, "a whole number >= 0", or_none=True)
        _require("top_logprobs", self.top_logprobs, int, lambda v: v >= 0, "a whole number >= 0")
        if not isinstance(self.logprobs, bool):
            raise InputError(f"logprobs must be True or False, got {self.logprobs!r}.")

    @property
    def drawing(self) -> Drawing:
        """How tokens are drawn where the model has no defaults of its own."""
        return self.drawing_on(Drawing())

    def drawing_on(self, own: Drawing) -> Drawing:
        """How tokens are drawn by a model with defaults of its own, which hold where nothing is said."""
        return Drawing(*(d if (said := getattr(self, f)) is None else said for f, d in own._asdict().items()))

    @classmethod
    def of(cls, options: Mapping[str, Any] | Sampling | None) -> Sampling:
        """Read sampling options from a mapping; refuse names that no field has.

        Raises:
            UnknownNameError: an option that does not exist (a typo is never ignored).
            InputError: a value out of range.
        """
        if options is None:
            return cls()
        if isinstance(options, Sampling):
            return options
        known = {f.name for f in dataclasses.fields(cls)}
        for name in options:
            if name not in known:
                raise UnknownNameError("sampling option", name, known)
        values = dict(options)
        if "stop" in values:
            values["stop"] = tuple(values["stop"]) if isinstance(values["stop"], list | tuple) else (values["stop"],)
        return cls(**values)

    def replace(self, **changes: Any) -> Sampling:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from the defaults, in the form that ``of`` reads."""
        default = Sampling()
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value != getattr(default, name)}


_MINUS_ONE = {"seed": None, "top_k": 0, "max_tokens": NO_LIMIT}


def _require(name: str, value: Any, kind: type, holds: Any, expected: str, *, or_none: bool = False) -> None:
    if value is None and or_none:
        return
    numeric = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not numeric or not math.isfinite(value) or not holds(value):
        raise InputError(f"{name} must be {expected}, got {value!r}.")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Text whose token ids are known, so that an engine with the same vocabulary need not encode it again.

    Args:
        text: the text that the ids decode to.
        ids: token ids, without special tokens.
        vocabulary: fingerprint of the tokenizer that made them.
    """

    text: str
    ids: tuple[int, ...]
    vocabulary: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """One response of the policy to one task.

    Args:
        index: position among the n candidates of its task.
        text: the response as the policy gave it.
        finish_reason: "stop" when it ended by itself, "length" when it was cut off, "abort" when it was stopped because
            it was not needed, "error" when it could not be made.
        tokens: the same text as token ids, when the policy's engine has them.
        cumulative_logprob: sum of log p of its tokens under the policy, when known (see ``Sampling.logprobs``).
        logprobs: text and log p of each sampled token, when known; special tokens have no text.
        completion_tokens: tokens sampled, counting the end token; None for callables.
        started, finished: seconds since the run began.
        error: what went wrong, for "error".
        tool_calls: calls of tools in OpenAI's format, whose canonical form ends the text.
        reasoning, refusal: what the model thought, and why it will not answer, where its server says so apart from the
            text.
        top_logprobs: the likeliest tokens at each place, in OpenAI's format, where the policy was asked for them.
    """

    index: int
    text: str
    finish_reason: FinishReason = "stop"
    tokens: Tokens | None = None
    cumulative_logprob: float | None = None
    logprobs: tuple[tuple[str, float], ...] | None = None
    completion_tokens: int | None = None
    started: float = 0.0
    finished: float = 0.0
    error: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    reasoning: str = ""
    refusal: str = ""
    top_logprobs: tuple[Sequence[Mapping[str, Any]], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise InputError(f"the text of candidate {self.index} must be text, not {type(self.text).__name__}.")


def without_text(refusal: str, reasoning: str, finish_reason: FinishReason) -> str:
    """Why a completion has no text, and what helps."""
    if refusal:
        return f"the model refused: {refusal}"
    if finish_reason == "length":
        where = "all its tokens went into thinking" if reasoning else "it was cut off before there was any"
        return f"no text: {where}; raise max_tokens"
    return "no text"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that were read and written, by which model.

    Args:
        policy_prompt_tokens, policy_completion_tokens: the policy's. A prompt counts as often as it was sent: once for
            all samples on an engine in this process, once for each HTTP request.
        scorer_prompt_tokens, scorer_completion_tokens: the scorer's.
        cached_tokens: prompt tokens of both that a shared prefix saved from being computed.
        drafted_tokens: of the scorer's completion tokens, those that were read as a draft in one pass, not decoded.
    """

    policy_prompt_tokens: int = 0
    policy_completion_tokens: int = 0
    scorer_prompt_tokens: int = 0
    scorer_completion_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Everything but what was cached."""
        return (
            self.policy_prompt_tokens
            + self.policy_completion_tokens
            + self.scorer_prompt_tokens
            + self.scorer_completion_tokens
            - self.cached_tokens
        )

    def __add__(self, other: Usage) -> Usage:
        return Usage(  # written out: it is added up several times for each candidate
            self.policy_prompt_tokens + other.policy_prompt_tokens,
            self.policy_completion_tokens + other.policy_completion_tokens,
            self.scorer_prompt_tokens + other.scorer_prompt_tokens,
            self.scorer_completion_tokens + other.scorer_completion_tokens,
            self.cached_tokens + other.cached_tokens,
            self.drafted_tokens + other.drafted_tokens,
        )


@dataclass(frozen=True, slots=True)
class Score:
    """What a scorer found out about one candidate. A scorer fills in what it knows; the group adds index and times.

    Args:
        reward: the reward, comparable within one task only; None when there is none, and then ``reason`` says why.
        status: "ok"; "repaired" and "fallback" when the scorer's answer had to be salvaged; "echo" when it repeats the
            response, so that the reward means nothing; "failed" when it could not be parsed or had; "empty" when the
            candidate has no text; "pruned" when it provably could not win; "late" when a deadline passed first.
        reason: why there is no reward, or what is to be said about it.
        explanation: what a reader is shown beside the reward: FLIP's inferred instruction, a judge's verdict.
        parts: rewards that this one is made of, by name.
        details: what this kind of scorer alone knows, a dataclass of its own (``FlipDetails``).
        tie_break: larger wins between equal rewards (mean log-probability of the reconstruction).
        spread: standard deviation of the reward, in its unit, where the scorer knows it: a head's, or the standard
            error of the mean of several samples. The selector ``lcb`` goes by it.
        upper_bound: for "pruned": the reward could not have exceeded this.
        usage: tokens that this score cost.
        error: what went wrong where that says nothing about the candidate (the scorer's model cannot be reached). Such
            a score is not kept; when no candidate of a task has a reward, it is the task's error.
        candidate: index of the candidate.
        same_as: index of an identical candidate whose score this is.
        started, finished: seconds since the run began.

    Raises:
        InputError: a reward that is no number, a status that does not exist or that goes with no reward, or details
            that are no dataclass.
    """

    reward: float | None
    status: ScoreStatus = "ok"
    reason: str | None = None
    explanation: str | None = None
    parts: Mapping[str, float | None] = field(default_factory=dict, hash=False)
    details: Any = None
    tie_break: float | None = None
    spread: float | None = None
    upper_bound: float | None = None
    usage: Usage = field(default_factory=Usage)
    error: BonError | None = None
    candidate: int = -1
    same_as: int | None = None
    started: float = 0.0
    finished: float = 0.0

    def __post_init__(self) -> None:
        if self.status not in _STATUSES:
            raise UnknownNameError("status of a score", self.status, _STATUSES)
        if self.reward is not None:
            if self.status not in REWARDED:
                raise InputError(f"a score of the status {self.status!r} has no reward, got {self.reward!r}.")
            if type(self.reward) is not float:
                object.__setattr__(self, "reward", as_reward(self.reward))  # a number of numpy's or torch's, say
        if self.details is not None and not hasattr(type(self.details), "__dataclass_fields__"):
            raise InputError(f"the details of a score are a dataclass, not {type(self.details).__name__}.")

    @property
    def tokens(self) -> int:
        """Tokens that the scorer wrote for this score."""
        return self.usage.scorer_completion_tokens

    def settled(self, told: Score) -> Score:
        """With the reward of ``told`` as the tie-break between equal rewards; what could not be had says why."""
        tie_break, reason = told.reward, self.reason
        if tie_break is None:
            tie_break = self.tie_break
            reason = reason or f"between equal rewards it was not rated: {told.reason or told.status}"
        usage, error = self.usage + told.usage, self.error or told.error
        return dataclasses.replace(self, tie_break=tie_break, reason=reason, usage=usage, error=error)

    def to_dict(self) -> dict[str, Any]:
        """Everything a reader of JSON needs; the fields of ``details`` stand beside the others."""
        hidden = ("details", "usage", "error")
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in hidden}
        details = {} if self.details is None else dataclasses.asdict(self.details)
        tokens = {"tokens": self.tokens, "drafted": self.usage.drafted_tokens}
        return {**details, **own, "parts": dict(self.parts), **tokens}


def as_reward(value: Any) -> float:
    """A number of whatever library as a float; whether it is finite is for the group to say.

    Raises:
        InputError: it is no number; text that reads as one is none.
    """
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise InputError(f"a reward must be a number or None, got {value!r:.60}.")


@dataclass(frozen=True, slots=True)
class Stop:
    """Why no more samples of a task were asked for, where its budget decides that while it runs.

    Args:
        reason: in words.
        gain: what one more sample could have been expected to gain, as the budget counts it; None where nobody knows.
    """

    reason: str
    gain: float | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """Which candidates a selector picked.

    Args:
        best: index of the winner, or None when the selector abstains.
        ranking: all candidate indices, best first; those without a reward come last.
        picked: the picked candidates (one, k of them, or none when it abstains).
        weights: one number per candidate where the selector works with weights (softmax, vote).
        reason: why it abstained.
    """

    best: int | None
    ranking: tuple[int, ...]
    picked: tuple[int, ...] = ()
    weights: tuple[float, ...] | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the seconds of one run went; prompts that ran in one batch share the figures of that batch.

    Args:
        sample: until the last candidate was there.
        score: from the first score's start to the last score's end.
        total: from the call to the selection.
        select: the selection.
        started: when the run began, in seconds since 1970; what is timed in a candidate or a score counts from here.
    """

    sample: float
    score: float
    total: float
    select: float = 0.0
    started: float = 0.0

    @property
    def overlap(self) -> float:
        """Seconds in which sampling and scoring went on at the same time."""
        return max(0.0, self.sample + self.score - self.total)


@dataclass(frozen=True, slots=True)
class Saved:
    """Work that was left undone, and an estimate of what it would have cost the scorer.

    What is counted is known. How many more tokens a reconstruction would have had is not: ``estimate`` takes one that
    was stopped to be as long as those of its task that ended were on average, if it was not longer already.

    Args:
        unsampled: candidates whose sampling was stopped, because one that is good enough was there.
        pruned: scores given up before their end, because the candidate could not win or another was good enough.
        copies: candidates that were not scored, because an identical one was.
        decoded: tokens that the scorer did decode.
        drafted: tokens of reconstructions that were read as a draft and not decoded, see ``Flip``.
        spent_pruned: tokens, decoded or drafted, that went into scores that were given up.
        estimate: tokens that the scorer would have decoded besides, had it scored each candidate, and to the end.
    """

    unsampled: int = 0
    pruned: int = 0
    copies: int = 0
    decoded: int = 0
    drafted: int = 0
    spent_pruned: int = 0
    estimate: int = 0

    @classmethod
    def of(cls, candidates: Sequence[Candidate], scores: Sequence[Score]) -> Saved:
        """Count what is missing from the candidates and scores of one task."""
        scored = [score for score in scores if score.same_as is None]
        ended = [score.tokens for score in scored if score.tokens and score.status not in ("pruned", "late")]
        usual = sum(ended) / len(ended) if ended else 0.0
        unsampled = {
            c.index
            for c, s in zip(candidates, scores, strict=True)
            if c.finish_reason == "abort" and s.status == "pruned"
        }
        pruned = [score for score in scored if score.status == "pruned" and score.candidate not in unsampled]
        copies = [score for score in scores if score.same_as is not None]
        missing = usual * len(unsampled) + sum(max(0.0, usual - score.tokens) for score in pruned)
        missing += sum(max(usual, score.tokens) if score.status == "pruned" else score.tokens for score in copies)
        return cls(
            unsampled=len(unsampled),
            pruned=len(pruned),
            copies=len(copies),
            decoded=sum(score.tokens - score.usage.drafted_tokens for score in scored),
            drafted=sum(score.usage.drafted_tokens for score in scored),
            spent_pruned=sum(score.tokens for score in pruned),
            estimate=round(missing),
        )

    @property
    def share(self) -> float:
        """What was drafted and what is estimated, as a share of all that the scorer would have decoded."""
        saved = self.drafted + self.estimate
        return saved / max(1, saved + self.decoded)

    def __add__(self, other: Saved) -> Saved:
        return Saved(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclass(frozen=True, slots=True)
class Credit:
    """What a sentence of the winner adds to its reward.

    Args:
        start, end: where it is in the winner's text, in characters.
        text: the sentence; in a long text, several.
        credit: the winner's reward less that of its text without the sentence; None where that could not be rated.
        reason: why there is none.
    """

    start: int
    end: int
    text: str
    credit: float | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """The best candidate of one task, with all the evidence.

    ``candidates`` and ``scores`` are aligned: ``scores[i]`` is about ``candidates[i]``. ``warnings`` are sentences that
    a reader must know before relying on it: rewards that say nothing, a winner that was cut off (``bon.remarks``).
    ``credit`` has what each sentence of the winner adds to its reward, where that was asked for (``bon.credit``), and
    ``stop`` why there are no more candidates, where that was decided while they came.
    """

    task: Task
    candidates: tuple[Candidate, ...]
    scores: tuple[Score, ...]
    selection: Selection
    timing: Timing
    usage: Usage
    warnings: tuple[str, ...] = ()
    credit: tuple[Credit, ...] | None = None
    stop: Stop | None = None

    @property
    def best(self) -> int | None:
        """Index of the winner; None when the selector abstained."""
        return self.selection.best

    @property
    def best_candidate(self) -> Candidate | None:
        """The winner; None when the selector abstained."""
        return None if self.best is None else self.candidates[self.best]

    @property
    def text(self) -> str | None:
        """The winner's text; None when the selector abstained."""
        return None if self.best is None else self.candidates[self.best].text

    @property
    def picked(self) -> tuple[Candidate, ...]:
        """The candidates that the selector picked, best first: one, or k for ``TopK``."""
        return tuple(self.candidates[i] for i in self.selection.picked)

    @property
    def reward(self) -> float | None:
        """The winner's reward; None when it has none."""
        return None if self.best is None else self.scores[self.best].reward

    @property
    def errors(self) -> tuple[str, ...]:
        """Why some of the n samples could not be made; empty when all were."""
        return tuple(candidate.error for candidate in self.candidates if candidate.error is not None)

    @property
    def saved(self) -> Saved:
        """What was not sampled, not scored or not scored to the end."""
        return Saved.of(self.candidates, self.scores)

    @property
    def counts(self) -> dict[str, int]:
        """How many scores have each status."""
        statuses = [score.status for score in self.scores]
        return {status: statuses.count(status) for status in sorted(set(statuses))}

    def __repr__(self) -> str:
        text = self.text if self.text is None or len(self.text) <= _SHOWN else self.text[:_SHOWN] + "…"
        return f"Result(text={text!r}, reward={self.reward}, n={len(self.candidates)})"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from bon.notebook import table

        return table(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything a reader of JSON needs: text, reward, best, warnings, candidates, scores, timing, usage, saved."""
        return {
            "text": self.text,
            "reward": self.reward,
            "best": self.best,
            "ranking": list(self.selection.ranking),
            "picked": list(self.selection.picked),
            "reason": self.selection.reason,
            "stop": self.stop and dataclasses.asdict(self.stop),
            "warnings": list(self.warnings),
            "instruction": self.task.instruction,
            "candidates": [_drop(dataclasses.asdict(c), "tokens", "logprobs") for c in self.candidates],
            "scores": [score.to_dict() for score in self.scores],
            "timing": {**dataclasses.asdict(self.timing), "overlap": self.timing.overlap},
            "usage": {**dataclasses.asdict(self.usage), "total_tokens": self.usage.total_tokens},
            "saved": {**dataclasses.asdict(self.saved), "share": self.saved.share},
            **({} if self.credit is None else {"credit": [dataclasses.asdict(each) for each in self.credit]}),
        }


def _drop(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
