"""Best-of-N: sample, score, select. The file to read first.

``BestOfN`` is configuration and the public methods. Candidates, scores and what goes wrong live in ``bon.group``, one
for each task; ``bon.pipeline`` fills groups; ``bon.selectors`` chooses. Everything else (command line, server, files,
evaluations, benchmarks) calls it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, Self, overload

from bon import portal
from bon.budget import Budget, as_budget
from bon.credit import credited
from bon.engines.base import Engine
from bon.errors import BonError, InputError, UnknownNameError, number, several
from bon.group import Callback, Follow, Group
from bon.models import Model, ModelPool
from bon.pipeline import SCHEDULES, Pipeline, Schedule, in_order, made, may_prune
from bon.scorers.base import Scorer
from bon.selectors import Selector, as_selector
from bon.task import Conversation, Message, Task
from bon.types import Candidate, Result, Sampling
from bon.usercode import is_async

OnError = Literal["raise", "return"]


class BestOfN:
    """Sample n candidates of a prompt, score them all, return the best with the evidence.

    Models that are given by name are loaded here and freed by ``close``; an engine that was passed in stays the
    caller's.

    Args:
        policy: what writes candidates: a model's name, folder or URL, with options if need be
            ("Qwen/Qwen3-4B,max_model_len=8192"), an ``Engine``, a function that returns one text or n texts, or None
            for the embedded mini model.
        scorer: what rewards them: a ``Scorer`` or its spec ("likelihood:Qwen/Qwen3-0.6B"), a reward function, or a
            model for FLIP to run on; None is the scorer ``default``, and FLIP for the embedded model.
        n: candidates for each prompt, or a ``Budget`` or its spec ("stop-at:0.9,most=16", "adaptive").
        sampling: how the policy samples; a ``Sampling`` or a mapping with its fields.
        selector: "best", another selector's spec ("top-k:3"), or a ``Selector``.
        min_reward: abstain when the best reward is below this.
        prune: stop scoring a candidate as soon as it provably cannot win. Ignored where every reward counts: by
            selectors that look at more than the best one, and by scorers that need all.
        schedule: when candidates are handed to the scorer: "each" as it finishes, "ready" those that are there whenever
            the scorer is free, "all" together at the end; None chooses, see ``Pipeline.schedule_for``.
        threads: of the arithmetic of models that are loaded here and run on the CPU; None leaves it to their engines.

    Attributes:
        given, given_selector: policy and scorer, and the selector, as they were passed; ``policy``, ``scorer`` and
            ``selector`` are what became of them.

    Raises:
        InputError: n < 1, an unknown name or option, a model that cannot be loaded.
    """

    def __init__(
        self,
        policy: str | Path | Model | Engine | Callable[..., Any] | None = None,
        scorer: str | Path | Scorer | Engine | Callable[..., Any] | None = None,
        *,
        n: int | str | Budget = 8,
        sampling: Sampling | Mapping[str, Any] | None = None,
        selector: str | Selector = "best",
        min_reward: float | None = None,
        prune: bool = True,
        schedule: Schedule | None = None,
        threads: int | None = None,
    ) -> None:
        if schedule is not None and schedule not in SCHEDULES:
            raise UnknownNameError("schedule", schedule, SCHEDULES)
        self.budget = as_budget(n)
        self.sampling = Sampling.of(sampling)
        self.selector = as_selector(selector, min_reward, seed=self.sampling.seed)
        self.prune, self.schedule, self.threads = prune, schedule, threads
        self.given = (policy, scorer)
        self.given_selector, self.min_reward = selector, min_reward
        self._pool = ModelPool(threads)
        try:
            self.policy, self.scorer = self._pool.both(policy, scorer)
            if fits := getattr(self.budget, "fits", None):
                fits(self.scorer, self.selector)
        except BaseException:
            portal.run(self._pool.aclose())  # the policy may be there, and the scorer's model not
            raise

    def __repr__(self) -> str:
        n = getattr(self.budget, "n", self.budget)
        return f"BestOfN({self.policy.name}, {self.scorer.name}, n={n})"

    @property
    def n(self) -> int | None:
        """The candidates of a prompt at most, where the budget knows."""
        return getattr(self.budget, "most", None)

    def replace(
        self,
        *,
        n: int | str | Budget | None = None,
        sampling: Sampling | Mapping[str, Any] | None = None,
        scorer: Scorer | None = None,
        min_reward: float | None = None,
        **changes: Any,
    ) -> BestOfN:
        """Return a copy with some settings changed, on the same engines; nothing is loaded.

        Args:
            n, sampling, scorer: None keeps what there is.
            min_reward: a minimum beside the one that the selector may have.
            changes: ``prune`` or ``schedule``, where None means None.

        Raises:
            InputError: what the constructor says of them.
        """
        other = BestOfN(
            self.policy,
            scorer or self.scorer,
            n=self.budget if n is None else n,
            sampling=self.sampling if sampling is None else sampling,
            selector=self.given_selector,
            min_reward=max(
                (number("min_reward", m) for m in (min_reward, self.min_reward) if m is not None), default=None
            ),
            **{"prune": self.prune, "schedule": self.schedule, "threads": self.threads, **changes},
        )
        other.given = (self.given[0], scorer or self.given[1])
        return other

    def another(self, scorer: str | Path | Scorer | Engine | Callable[..., Any]) -> Scorer:
        """A further scorer; where it names no model it runs on the policy's, and what it loads is freed with the rest.

        Raises:
            BonError: it does not exist, or its models cannot be had.
        """
        return self._pool.scorer(scorer, self.policy)

    @overload  # a str is a Sequence[str] as well, and is one prompt
    def __call__(  # type: ignore[overload-overlap]
        self,
        prompt: str | Sequence[Message | Mapping[str, Any]] | Task,
        *,
        instruction: str | None = None,
        n: int | str | Budget | None = None,
        sampling: Sampling | Mapping[str, Any] | None = None,
    ) -> Result: ...

    @overload
    def __call__(
        self,
        prompt: Sequence[str | Task | Sequence[Message | Mapping[str, Any]]],
        *,
        n: int | str | Budget | None = None,
        sampling: Sampling | Mapping[str, Any] | None = None,
        on_error: OnError = "raise",
        progress: bool = False,
    ) -> list[Result | BonError]: ...

    def __call__(
        self,
        prompt: Any,
        *,
        instruction: str | None = None,
        n: int | str | Budget | None = None,
        sampling: Sampling | Mapping[str, Any] | None = None,
        on_error: OnError = "raise",
        progress: bool = False,
    ) -> Any:
        """Return the best of n for one prompt, or a list of results for a list of prompts; blocks.

        Inside an event loop ``await run(...)`` instead.

        Args:
            prompt: text, a list of messages that ends with the user's, or a ``Task``; or a list of any of these.
            instruction: for one prompt, the part of the last user message that is the instruction; the rest of it is
                context.
            n, sampling: in place of the constructor's, for this call.
            on_error: for a list, whether the first prompt that fails raises its error, or stands in its place.
            progress: for a list, show a progress bar on a terminal.
        """
        bon = self if n is None and sampling is None else self.replace(n=n, sampling=sampling)
        if not _is_list_of_prompts(prompt):
            if on_error != "raise" or progress:
                raise InputError("on_error= and progress= are for a list of prompts, and this is one prompt.")
            return portal.run(bon.run(prompt, instruction=instruction))
        if instruction is not None:
            raise InputError("instruction= is for one prompt; in a list, pass Task.of(prompt, instruction) for each.")
        return list(bon.map(prompt, on_error=on_error, progress=progress))

    def map(
        self, prompts: Iterable[Conversation | Task], *, on_error: OnError = "raise", progress: bool = False
    ) -> Iterator[Result | BonError]:
        """Yield one result for each prompt, in order; prompts run together where the engines allow it.

        Args:
            prompts: read when they are needed.
            on_error: whether the first prompt that fails raises its error, after the results before it, or stands in
                its place.
            progress: show a progress bar on a terminal.

        Raises:
            BonError: of the first prompt that fails, unless on_error is "return".
        """
        from tqdm import tqdm

        if on_error not in ("raise", "return"):
            raise UnknownNameError("on_error", on_error, ["raise", "return"])
        total = len(prompts) if isinstance(prompts, Sequence) else None
        # Closed here: an error that somebody keeps would keep the prompts that are still running alive with it.
        with closing(portal.iterate(in_order(self.stream(prompts)))) as outcomes:
            for _, outcome in tqdm(outcomes, total=total, unit="prompt", disable=None if progress else True):
                if isinstance(outcome, BonError) and on_error == "raise":
                    raise outcome
                yield outcome

    def rerank(
        self, prompt: Conversation | Task, candidates: Sequence[str | Candidate], *, instruction: str | None = None
    ) -> Result:
        """Score and rank responses that came from elsewhere; blocks."""
        return portal.run(self.run_rerank(prompt, candidates, instruction=instruction))

    def credit(self, result: Result) -> Result:
        """Return a result with what each sentence of its winner adds to its reward (``Result.credit``); blocks."""
        return portal.run(self.run_credit(result))

    async def run(
        self,
        prompt: Conversation | Task,
        *,
        instruction: str | None = None,
        n: int | str | Budget | None = None,
        sampling: Sampling | Mapping[str, Any] | None = None,
        callback: Callback | None = None,
        follow: Follow | None = None,
        deadline: float | None = None,
    ) -> Result:
        """Return the best of n for one prompt.

        Args:
            prompt, instruction, n, sampling: as for ``__call__``.
            callback: told of each candidate and score as it comes, copies and empty ones included.
            follow: told how far each candidate is, as a ``Partial`` every few tokens, perhaps from another thread; an
                engine that can stream then does.
            deadline: seconds after which the best so far is returned; the rest is aborted and has the status "late".
        """
        if deadline is not None:
            number("deadline", deadline)
        for told in (callback, follow):
            if told is not None and is_async(told):
                raise InputError("the callback is called and not awaited: pass a plain function.")
        bon = self if n is None and sampling is None else self.replace(n=n, sampling=sampling)
        group = bon._group(prompt, instruction, callback, follow)
        await bon._pipeline(bon.policy).run([group], deadline)
        return group.result(bon.selector)

    async def run_rerank(
        self, prompt: Conversation | Task, candidates: Sequence[str | Candidate], *, instruction: str | None = None
    ) -> Result:
        """Score and rank responses that came from elsewhere."""
        group = self._given(prompt, candidates, instruction)
        await self._pipeline().run([group])
        return group.result(self.selector)

    async def run_credit(self, result: Result, *, deadline: float | None = None) -> Result:
        """Return a result with what each sentence of its winner adds to its reward; see ``bon.credit.credited``."""
        return await credited(self.scorer, result, deadline)

    def stream(self, prompts: Iterable[Conversation | Task]) -> AsyncGenerator[tuple[int, Result | BonError], None]:
        """Yield (position, result) for many prompts as they finish.

        A prompt that fails yields its error in place of a result, and the others go on. Prompts are read when they are
        needed, on a thread of their own: they may take their time.
        """
        groups = (made(self._group, prompt) for prompt in several("prompts are a list of prompts", prompts))
        return self._pipeline(self.policy).results(groups, self.selector)

    def _pipeline(self, policy: Any = None) -> Pipeline:
        return Pipeline(self.scorer, policy, self.budget, self.sampling, self.schedule)

    @property
    def _terms(self) -> dict[str, Any]:
        """What may be given up in a group, sampled or not."""
        return {
            "prune": self.prune and may_prune(self.scorer, self.selector),
            "stop_at": getattr(self.budget, "stop_at", None),
            "whole": self.scorer.needs.group,
        }

    def _group(
        self,
        prompt: Conversation | Task,
        instruction: str | None = None,
        callback: Callback | None = None,
        follow: Follow | None = None,
    ) -> Group:
        return Group(Task.of(prompt, instruction), callback=callback, follow=follow, **self._terms)

    def _given(
        self, prompt: Conversation | Task, candidates: Sequence[str | Candidate], instruction: str | None = None
    ) -> Group:
        return Group.of(prompt, candidates, instruction=instruction, **self._terms)

    async def aclose(self) -> None:
        """Free the models that were loaded here."""
        await self._pool.aclose()

    def close(self) -> None:
        """Free the models that were loaded here; blocks."""
        portal.run(self.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


def _is_list_of_prompts(prompt: Any) -> bool:
    """Whether a list holds prompts, and not the messages of one."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and not (prompt and isinstance(prompt[0], Message | Mapping))
    )
