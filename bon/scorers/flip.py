"""FLIP: infer the instruction back from each response; agreement with the original one is the reward.

Source: "Small Reward Models via Backward Inference", arXiv 2602.13551. All items of a call become one batch of the
engine. A reconstruction is given up as soon as the best reward it can still reach lies strictly below one that another
candidate of the same task has; the bound holds for whatever the parser could finally return, so the winner is the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from bon.engines.base import Completion, Engine, Keep, Loglikelihood, Partial, Prompt, WritesJSON, load_engine
from bon.errors import InputError, PromptTooLongError, UnknownNameError
from bon.prompts import Style, load_style
from bon.scorers.base import Item, Scored
from bon.scorers.drafting import Drafting
from bon.scorers.parsing import Parsed, Parser, response_piece
from bon.similarity import Bound, Match, Similarity, as_similarity, mean_bound
from bon.types import Sampling, Score, ScoreStatus, Usage

TieBreak = Literal["logprob", "likelihood"]
MAX_TOKENS = 512
"""Tokens of a reconstruction, as in the paper."""
RETRY_TEMPERATURE = 0.7
_WORST_LAST: tuple[ScoreStatus, ...] = ("ok", "repaired", "fallback")


class Flip:
    """Scores candidates by backward inference.

    Args:
        model: what infers instructions: a model name or folder, an ``Engine``, or None for the policy's own model
            (by itself, without a policy: the embedded mini model). A model given by name is loaded on first use and
            freed by ``aclose``; an engine stays its owner's.
        prompt: "direct" (the bare instruction), "json" (reasoning first, as in the paper), or a ``Style``
            (``bon.prompts.from_files``).
        parser: "robust", or "reference" for the paper's released code with its quirks.
        similarity: a name in ``bon.similarity.SIMILARITIES``, or a ``Similarity``.
        samples: reconstructions per candidate; the reward is the mean over those that could be parsed.
        sampling: how reconstructions are sampled. Greedy for one sample, temperature 1 for several, 512 tokens.
        tie_break: between equal rewards, "logprob" prefers the likelier reconstruction, "likelihood" the higher mean
            log p(instruction | response), which costs one more prefill.
        retries: how often candidates none of whose reconstructions could be parsed are tried again, at temperature 0.7
            at least.
        thinking: whether the model may think before it answers. Off, templates that know ``enable_thinking`` are told
            so, and an answer that closes a thinking block it did not open has failed.
        draft: whether the instruction is handed to the engine as a guess at a greedy "direct" reconstruction, for as
            long as that pays (``bon.scorers.drafting``); it changes the cost and no reward, up to rounding of the
            model's arithmetic.
        options: passed on when a model is loaded by name, ``engine="torch"`` among them.

    Raises:
        UnknownNameError: a prompt, parser, similarity or tie-break that does not exist.
        InputError: samples < 1, retries < 0, options for an engine that is already there.
    """

    def __init__(
        self,
        model: str | Path | Engine | None = None,
        *,
        prompt: str | Style = "direct",
        parser: str = "robust",
        similarity: str | Similarity = "word_f1",
        samples: int = 1,
        sampling: Sampling | None = None,
        tie_break: TieBreak = "logprob",
        retries: int = 0,
        thinking: bool = False,
        draft: bool = True,
        **options: Any,
    ) -> None:
        if tie_break not in ("logprob", "likelihood"):
            raise UnknownNameError("tie-break", tie_break, ["logprob", "likelihood"])
        self.samples, self.retries = whole("samples", samples, 1), whole("retries", retries, 0)
        self.style = load_style(prompt)
        self.parser = Parser(parser, self.style.output, thinking)
        self.similarity = as_similarity(similarity)
        self.sampling = sampling or Sampling(temperature=0.0 if samples == 1 else 1.0, max_tokens=MAX_TOKENS)
        self.tie_break: TieBreak = tie_break
        self.template = {"enable_thinking": thinking}
        greedy = self.samples == 1 and self.sampling.temperature == 0
        self._drafting = Drafting(draft and greedy and self.style.output == "text")
        self._model = LazyEngine(model, options)

    @property
    def name(self) -> str:
        """Style and model."""
        return f"flip-{self.style.name}({self._model.name})"

    @property
    def engine(self) -> Engine | None:
        """The engine, loaded now if it was not; None as long as no model was named (see ``on``)."""
        return self._model.named

    def on(self, engine: Engine) -> Flip:
        """Return the same scorer on another engine, which stays its owner's."""
        other = self._model.moved(self, engine)
        other._drafting = self._drafting.anew()
        return other

    @property
    def overlaps(self) -> bool:
        """Whether calls may run at the same time."""
        return self._model.engine.overlaps

    async def score(self, items: Sequence[Item]) -> AsyncIterator[Scored]:
        """Score every item once; scores come as they are known, rewards reach the boards at once."""
        runs = []
        for index, item in enumerate(items):
            response = response_piece(item.candidate)
            if response is None:
                yield no_response(index, item)
            else:
                prompt = self.style.prompt(item.task, response, self.template)
                if self._drafting.pays():
                    prompt = replace(prompt, draft=item.task.instruction.strip())
                runs.append(_Run(index, item, prompt, self.parser, self.similarity, self.samples))
        finished: list[_Run] = []
        for attempt in range(self.retries + 1):
            again: list[_Run] = []
            async with aclosing(self._reconstruct(runs, _retry(self.sampling, attempt))) as ended:
                async for run in ended:
                    if run.status == "failed" and attempt < self.retries and not run.too_long:
                        again.append(run.restarted())
                    elif self.tie_break == "likelihood" and run.reward is not None:
                        finished.append(run)
                    else:
                        yield run.scored(run.mean_logprob)
            runs = again
            if not runs:
                break
        for run, likelihood in await self._likelihoods(finished):
            yield run.scored(likelihood.mean if likelihood else None, likelihood)

    async def _reconstruct(self, runs: list[_Run], sampling: Sampling) -> AsyncGenerator[_Run, None]:
        """Run all reconstructions as one batch and yield each run when its last one ends."""
        fitting = runs
        while fitting:
            try:
                prompts, keep = [run.prompt for run in fitting], _keep(fitting, sampling.stop)
                stream = self._model.engine.generate(prompts, self._held(sampling), self.samples, keep=keep)
                async with aclosing(stream) as completions:  # type: ignore[type-var]
                    async for completion in completions:
                        run = fitting[completion.prompt_index]
                        if run.prompt.draft:
                            self._drafting.learn(completion)
                        if run.finish(completion):
                            run.item.board.post(run.reward)
                            yield run
                return
            except PromptTooLongError as error:
                if not error.indices:
                    raise
                for index in error.indices:
                    fitting[index].too_long = str(error)
                    yield fitting[index]
                fitting = [run for run in fitting if not run.too_long]

    def _held(self, sampling: Sampling) -> Sampling:
        """Hold the engine to the style's JSON schema where it can be held, and need not think first."""
        engine, schema = self._model.engine, self.style.schema
        if schema is None or self.template["enable_thinking"] or not isinstance(engine, WritesJSON):
            return sampling
        return sampling.replace(extra={**engine.json_options(schema), **sampling.extra})

    async def _likelihoods(self, runs: list[_Run]) -> list[tuple[_Run, Loglikelihood | None]]:
        """Rate the original instruction after each response; None where it does not fit the context."""
        style = self.style if self.style.output == "text" else load_style("direct")
        prompts = {
            i: style.prompt(run.item.task, response_piece(run.item.candidate) or "", self.template)
            for i, run in enumerate(runs)
        }
        rated: dict[int, Loglikelihood] = {}
        while prompts:
            order = list(prompts)
            try:
                values = await self._model.engine.loglikelihood(
                    list(prompts.values()), [runs[i].item.task.instruction.strip() for i in order]
                )
            except PromptTooLongError as error:
                if not error.indices:
                    raise
                for position in error.indices:
                    del prompts[order[position]]
            else:
                rated = dict(zip(order, values, strict=True))
                break
        return [(run, rated.get(i)) for i, run in enumerate(runs)]

    async def aclose(self) -> None:
        """Free the model if it was loaded here."""
        await self._model.aclose()


def _retry(sampling: Sampling, attempt: int) -> Sampling:
    if attempt == 0:
        return sampling
    seed = None if sampling.seed is None else sampling.seed + attempt
    return sampling.replace(temperature=max(sampling.temperature, RETRY_TEMPERATURE), seed=seed)


def _keep(runs: list[_Run], stop: tuple[str, ...]) -> Keep | None:
    """Say of a growing reconstruction whether it is worth going on; None when nothing could ever be given up."""
    if not any(run.prunable for run in runs):
        return None
    return lambda partial: runs[partial.prompt_index].keep(partial, stop)


@dataclass
class _Run:
    """One candidate's reconstructions, while they are made and after.

    ``bounds[s]`` is what sample s can still reach, ``matches[s]`` what it did reach.
    """

    index: int
    item: Item
    prompt: Prompt
    parser: Parser
    similarity: Similarity
    samples: int
    too_long: str = ""
    completions: dict[int, Completion] = field(default_factory=dict)
    parsed: dict[int, Parsed] = field(default_factory=dict)
    matches: dict[int, Match] = field(default_factory=dict)
    bounds: list[float] = field(default_factory=list)
    counters: list[Bound | None] = field(default_factory=list)
    spent: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        instruction = self.item.task.instruction
        self.counters = [self.similarity.bound(instruction) for _ in range(self.samples)]
        self.bounds = [self.similarity.maximum] * self.samples

    def restarted(self) -> _Run:
        """Another try, which remembers what was spent."""
        return _Run(self.index, self.item, self.prompt, self.parser, self.similarity, self.samples, spent=self.usage)

    @property
    def prunable(self) -> bool:
        """Whether ``keep`` may ever say no."""
        board = self.item.board
        return board.stop_at is not None or (board.prune and self.parser.settles and self.counters[0] is not None)

    def keep(self, partial: Partial, stop: Iterable[str] = ()) -> bool:
        """Tighten the bound with what a sample has written so far; False when the candidate cannot win."""
        counter = self.counters[partial.sample_index]
        settled = self.parser.settled(_before_stop(partial.text, stop))
        if counter is not None and settled is not None:
            self.bounds[partial.sample_index] = counter.update(settled)
        return not self.item.board.hopeless(self.upper_bound)

    def finish(self, completion: Completion) -> bool:
        """Take in a completion; True when it was the last one."""
        sample = completion.sample_index
        self.completions[sample] = completion
        if completion.finish_reason != "pruned":
            if completion.error is not None:
                parsed = Parsed("failed", None, str(completion.error))
            else:
                parsed = self.parser.parse(completion.text, completion.finish_reason)
            self.parsed[sample] = parsed
            if parsed.instruction is not None:
                self.matches[sample] = self.similarity(parsed.instruction, self.item.task.instruction)
        return len(self.completions) == self.samples

    @property
    def upper_bound(self) -> float:
        """The highest reward that the candidate can still reach."""
        unfinished = [bound for sample, bound in enumerate(self.bounds) if sample not in self.parsed]
        return min(self.similarity.maximum, mean_bound((m.f1 for m in self.matches.values()), unfinished))

    @property
    def status(self) -> ScoreStatus:
        """What to report: pruned if any sample was, else the worst of the samples that could be parsed."""
        if len(self.parsed) < len(self.completions):
            return "pruned"
        usable = [p.status for s, p in self.parsed.items() if s in self.matches]
        return max(usable, key=_WORST_LAST.index) if usable else "failed"

    @property
    def reward(self) -> float | None:
        """Mean similarity over the samples that could be parsed."""
        if self.status in ("pruned", "failed"):
            return None
        return math.fsum(m.f1 for m in self.matches.values()) / len(self.matches)

    @property
    def usage(self) -> Usage:
        """Tokens spent so far; the prompt counts once for all samples."""
        done = self.completions.values()
        return self.spent + Usage(
            scorer_prompt_tokens=max((c.prompt_tokens for c in done), default=0),
            scorer_completion_tokens=sum(c.completion_tokens for c in done),
            cached_tokens=min((c.cached_tokens for c in done), default=0),
            drafted_tokens=sum(c.drafted_tokens for c in done),
        )

    def scored(self, tie_break: float | None, likelihood: Loglikelihood | None = None) -> Scored:
        """Report, with the value that decides between equal rewards and what that cost."""
        usage = self.usage
        if likelihood is not None:
            prompt_tokens = likelihood.prompt_tokens + likelihood.tokens
            usage += Usage(scorer_prompt_tokens=prompt_tokens, cached_tokens=likelihood.cached_tokens)
        tokens, drafted = usage.scorer_completion_tokens, usage.drafted_tokens
        candidate, status, reward = self.item.candidate.index, self.status, self.reward
        if reward is None:
            bound = self.upper_bound if status == "pruned" else None
            reason = self._reason(status)
            score = Score(candidate, None, status, tokens=tokens, drafted=drafted, upper_bound=bound, reason=reason)
            return Scored(self.index, score, usage)
        nearest = min(self.matches, key=lambda s: (abs(self.matches[s].f1 - reward), s))
        score = Score(
            candidate,
            reward,
            status,
            inferred=self.parsed[nearest].instruction,
            precision=self._mean([m.precision for m in self.matches.values()]),
            recall=self._mean([m.recall for m in self.matches.values()]),
            tie_break=tie_break,
            tokens=tokens,
            drafted=drafted,
            reason=self._reason(status),
            samples=tuple(self.matches[s].f1 for s in sorted(self.matches)) if self.samples > 1 else (),
        )
        return Scored(self.index, score, usage)

    def _reason(self, status: ScoreStatus) -> str | None:
        if self.too_long:
            return f"the response does not fit the scorer: {self.too_long}"
        if status == "pruned":
            if self.item.board.reached:
                return "another candidate has reached the reward to stop at"
            return f"could not reach the best reward so far ({self.item.board.best:.3f})"
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


def _before_stop(text: str, stop: Iterable[str]) -> str:
    """Cut off an end that may be the beginning of a stop string, which an engine would remove again."""
    for mark in stop:
        for length in range(min(len(mark), len(text)), 0, -1):
            if text.endswith(mark[:length]):
                text = text[:-length]
                break
    return text


def no_response(index: int, item: Item) -> Scored:
    """Score a candidate that has nothing to score."""
    reason = "there is no text" if not item.candidate.text.strip() else "there is nothing but thinking"
    return Scored(index, Score(item.candidate.index, None, "empty", reason=reason))


def whole(name: str, value: int, least: int) -> int:
    """Check a whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number >= {least}, got {value!r}.")
    return value


class _HasModel(Protocol):
    _model: LazyEngine


S = TypeVar("S", bound=_HasModel)


class LazyEngine:
    """An engine that is there, or a model that is loaded on first use."""

    def __init__(self, model: str | Path | Engine | None, options: dict[str, Any]) -> None:
        self._engine: Engine | None = None
        self._name, self._options = model, options
        if not (model is None or isinstance(model, str | Path)):
            if not isinstance(model, Engine):
                raise InputError(f"a scorer's model must be a name, a folder or an engine, got {model!r}.")
            if options:
                raise InputError(f"{', '.join(sorted(options))}: options are for models loaded by name.")
            self._engine = model

    @property
    def name(self) -> str:
        """Name of the model."""
        return self._engine.name if self._engine else "mini" if self._name is None else str(self._name)

    @property
    def engine(self) -> Engine:
        """The engine, loaded now if it was not."""
        if self._engine is None:
            assert self._name is None or isinstance(self._name, str | Path)
            self._engine = load_engine(self._name, **self._options)
        return self._engine

    @property
    def named(self) -> Engine | None:
        """The engine, or None when nobody said which."""
        return None if self._engine is None and self._name is None else self.engine

    @staticmethod
    def moved(scorer: S, engine: Engine) -> S:
        """Return a copy of a scorer whose ``_model`` is another engine."""
        other = copy.copy(scorer)
        other._model = LazyEngine(engine, {})
        return other

    async def aclose(self) -> None:
        """Free the engine if it was loaded here; it loads again when it is needed."""
        if self._engine is not None and self._engine is not self._name:
            await self._engine.aclose()
            self._engine = None
