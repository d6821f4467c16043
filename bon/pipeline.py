"""The only scheduler: asks the budget, samples, hands candidates to the scorer, and ends when nothing more is wanted.

Groups that run together share the batches of engines that want everything at once; on engines whose requests join a
running batch each group is sampled by itself, so that it is known whose an error is. What user code raises (a scorer, a
budget, a callback) belongs to the group that it was called for.
"""

from __future__ import annotations

import asyncio
import math
import operator
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any, Literal, TypeVar

from bon import portal
from bon.budget import MOST, Budget
from bon.engines.base import Completion, Generates, Keep, Prompt, Request, Wanted
from bon.errors import BonError, EngineError, InputError, several, user_error
from bon.group import Group
from bon.models import ModelPool
from bon.remarks import of_sampling, of_task
from bon.scorers.base import Pending, Scorer
from bon.selectors import Selector, only_the_best_counts
from bon.task import Conversation, Task
from bon.types import Candidate, Result, Sampling, Score, Usage

T = TypeVar("T")

# When candidates are handed to the scorer: each as it finishes, all that are there whenever the scorer is free, or all
# together at the end.
Schedule = Literal["each", "ready", "all"]
SCHEDULES: tuple[Schedule, ...] = ("each", "ready", "all")

# Candidates that go through one-batch-at-a-time engines together: enough to fill their batches, few enough that results
# keep coming and memory stays flat over a long file.
WAVE = 256


@dataclass(frozen=True)
class Pipeline:
    """Fills groups: samples candidates where there is a policy, and scores them.

    Args:
        scorer: with its models in place.
        policy: what writes candidates; None where all groups bring theirs.
        budget: how many samples a group gets.
        sampling: how the policy samples.
        schedule: when candidates are handed to the scorer; None chooses, see ``schedule_for``.
        settle: whether the scorer decides between equal rewards; not where only the rewards are looked at.
    """

    scorer: Scorer
    policy: Generates | None = None
    budget: Budget | None = None
    sampling: Sampling = field(default_factory=Sampling)
    schedule: Schedule | None = None
    settle: bool = True

    @property
    def concurrent(self) -> bool:
        """Whether groups run beside each other, each by itself."""
        return self.scorer.concurrent and (self.policy is None or self.policy.concurrent)

    async def run(self, groups: Sequence[Group], deadline: float | None = None) -> None:
        """Sample and score groups until their budgets want no more, or until ``deadline`` seconds have passed."""
        try:
            async with asyncio.timeout(deadline):
                await self._begin(groups)
                while asked := self._asked(groups):
                    await _Round(self, asked, live=deadline is not None).run()
                await self._settle(groups)
        except TimeoutError:  # of asyncio.timeout: what engines and scorers raise has been noted by then
            for group in groups:
                group.expire(f"the deadline of {deadline:g} s passed")

    async def stream(self, groups: Iterable[Group | BonError]) -> AsyncGenerator[tuple[int, Group | BonError], None]:
        """Run many groups and yield (position, group) as they finish; what could not become a group passes through.

        Groups are made when they are needed, on a thread of their own: the iterable may take its time. What it raises
        comes after the groups before it.
        """
        together = hasattr(self.budget, "share")
        if not together and not self.concurrent:
            async with aclosing(self._refilled(groups)) as finished:
                async for outcome in finished:
                    yield outcome
            return
        running: dict[asyncio.Future[Any], int] = {}  # and how many candidates each has
        reading: set[asyncio.Future[Any]] = set()
        broken: Exception | None = None
        more, enough = True, math.inf if together else 1
        waves = _chunks(enumerate(groups), enough, lambda item: self._size(item[1]))
        async with aclosing(portal.pull(waves)) as chunks:
            try:
                while more or running:
                    if more and not reading and sum(running.values()) < WAVE:
                        reading = {asyncio.ensure_future(anext(chunks, []))}
                    done, _ = await asyncio.wait({*running, *reading}, return_when=asyncio.FIRST_COMPLETED)
                    for read in done & reading:
                        reading, chunk = set(), []
                        try:
                            chunk = read.result()
                        except Exception as error:
                            broken = error
                        more = bool(chunk)
                        if chunk:
                            size = sum(self._size(item) for _, item in chunk)
                            running[asyncio.create_task(self._wave(chunk))] = size
                    for wave in done & running.keys():
                        del running[wave]
                        for outcome in wave.result():
                            yield outcome
                if broken is not None:
                    raise broken
            finally:
                for task in {*running, *reading}:
                    task.cancel()
                await asyncio.gather(*running, *reading, return_exceptions=True)

    async def _begin(self, groups: Sequence[Group]) -> None:
        """Note what is known of each task, and score the candidates that it brings."""
        for group in groups:
            group.range = None if self.scorer.needs.group else self.scorer.range
            group.warnings += of_task(group.task, [self.policy, *self.scorer.engines])
            if self.scorer.needs.reference and group.task.reference is None:
                name = self.scorer.name
                group.fail(InputError(f"the scorer {name!r} compares with a reference, and the task has none."))
        if given := [w for group in groups for w in group.pending()]:
            await self._score(given)

    async def _refilled(self, groups: Iterable[Group | BonError]) -> AsyncGenerator[tuple[int, Group | BonError], None]:
        """Like ``stream``, round by round: groups that are over make room for others, so that batches are full."""
        going: dict[Group, int] = {}  # and where they stand
        broken: Exception | None = None
        more = True
        async with aclosing(portal.pull(enumerate(groups))) as items:
            while more or going:
                asked = self._asked([*going])
                over = going.keys() - {group for group, _ in asked}
                await self._settle([*over])
                for group in [group for group in going if group in over]:
                    yield going.pop(group), group
                room, fresh = WAVE - sum(request.n for _, request in asked), list[Group]()
                while more and room > 0:
                    try:
                        position, item = await anext(items)
                    except StopAsyncIteration:
                        item = None
                    except Exception as error:
                        item, broken = None, error
                    if isinstance(item, Group):
                        going[item] = position
                        fresh.append(item)
                    elif item is not None:
                        yield position, item
                    more, room = item is not None, room - self._size(item)
                await self._begin(fresh)
                if asked := asked + self._asked(fresh):
                    await _Round(self, asked, live=False).run()
        if broken is not None:
            raise broken

    async def results(
        self, groups: Iterable[Group | BonError], selector: Selector
    ) -> AsyncGenerator[tuple[int, Result | BonError], None]:
        """Run many groups as ``stream`` does; yield (position, what the selector picked, or why there is nothing)."""
        async with aclosing(self.stream(groups)) as finished:
            async for position, group in finished:
                yield position, group if isinstance(group, BonError) else made(group.result, selector)

    async def _wave(self, chunk: list[tuple[int, Group | BonError]]) -> list[tuple[int, Group | BonError]]:
        await self.run([item for _, item in chunk if isinstance(item, Group)])
        return chunk

    def _size(self, item: Group | BonError | None) -> int:
        if not isinstance(item, Group):
            return 1
        return item.asked or getattr(self.budget, "least", None) or getattr(self.budget, "most", None) or 1

    def _asked(self, groups: Sequence[Group]) -> list[tuple[Group, Request]]:
        """What the budget wants more of."""
        asked = []
        most = getattr(self.budget, "most", None) or MOST
        sampling = self.scorer.needs.asked(self.sampling)
        try:
            if share := getattr(self.budget, "share", None):
                share(groups)
        except Exception as error:
            for group in groups:
                group.fail(user_error("the budget", error))
        for group in groups:
            if self.policy is None or self.budget is None or group.over or group.stuck:
                continue
            try:
                if more := min(_whole(self.budget.more(group)), max(0, most - group.asked)):
                    prompt = Prompt.of(group.task.messages)
                    group.warnings += of_sampling(sampling, group.asked + more) if not group.asked else ()
                    first = group.ask(more)
                    asked.append((group, Request(prompt, sampling, more, first, continued=group.asked < most)))
            except Exception as error:
                group.fail(user_error("the budget", error))
        return asked

    def schedule_for(self, groups: Sequence[Group], *, live: bool = False) -> Schedule:
        """When candidates are handed to the scorer, unless the user said so.

        A scorer that looks at whole groups gets them at the end. One whose requests join a running batch gets each
        candidate at once: a reward that is there early lets others be pruned or stopped. Where nothing can be skipped
        and one engine does both, reading candidates only holds up those that are still written, so they are scored
        together at the end; unless somebody waits for single scores (``live``). A scorer that wants whole batches gets
        what is ready whenever it is free, or everything at the end where the policy wants the machine for itself as
        well. ``benchmarks/latency.py --engine vllm`` measures it.
        """
        if self.scorer.needs.group:
            return "all"
        if self.schedule is not None:
            return self.schedule
        if not self.scorer.concurrent:
            return "ready" if self.policy is not None and self.policy.concurrent else "all"
        skips = any(group.prune or group.stop_at is not None for group in groups)
        live = live or any(group.watched for group in groups)
        one_engine = {*map(id, self.scorer.engines)} == {id(self.policy)}
        return "all" if one_engine and not skips and not live else "each"

    async def _score(self, pending: Sequence[Pending]) -> None:
        """Score candidates and post each score as it comes; what goes wrong is noted in the groups that it concerns."""
        for group, candidate in ((p.group, p.candidate) for p in pending if p.group.reached and not p.group.whole):
            if not group.scored(candidate):
                reason = "another candidate has reached the reward to stop at"
                group.post(candidate, Score(None, "pruned", reason=reason), perf_counter())
        pending = [p for p in pending if p.group.error is None and (p.group.whole or not p.group.scored(p.candidate))]
        if not pending:
            return
        left = dict(enumerate(pending))
        try:
            await self._post(pending, left)
        except EngineError as error:
            for group, candidate in ((p.group, p.candidate) for p in left.values()):
                if error.retryable:
                    group.post(candidate, Score(None, "failed", f"not scored: {error}", error=error))
                else:
                    group.fail(error)
            for each in pending if not left and not error.retryable else ():
                each.group.fail(error)
        except Exception as error:
            groups = list(dict.fromkeys(p.group for p in left.values() or pending if p.group.error is None))
            if len(groups) > 1 and left:
                for group in groups:  # whose fault it is shows when each is scored by itself
                    await self._score([p for p in pending if p.group is group])
            else:
                for group in groups:
                    group.fail(user_error(f"the scorer {self.scorer.name!r}", error))

    async def _settle(self, groups: Sequence[Group]) -> None:
        """Let the scorer decide between texts that share the best reward; a tie that stays costs no result."""
        tied = [pending for group in groups if self.settle and group.error is None for pending in group.tied()]
        if not tied:
            return
        try:
            async with _closing(self.scorer.settle(tied)) as scores:
                async for position, score in scores:
                    tied[position].group.settle(tied[position].candidate, score)
        except Exception as error:
            said = user_error(f"the scorer {self.scorer.name!r}", error)
            for group in dict.fromkeys(pending.group for pending in tied):
                group.warnings.append(f"what shares the best reward could not be rated further: {said}")

    async def _post(self, pending: Sequence[Pending], left: dict[int, Pending]) -> None:
        """Score ``pending`` and post each score; ``left`` loses what has one."""
        started = perf_counter()
        async with _closing(self.scorer.score(pending)) as scores:
            async for position, score in scores:
                if (scored := left.pop(position, None)) is not None:
                    scored.group.post(scored.candidate, score, started)
                    continue
                known = isinstance(position, int) and 0 <= position < len(pending)
                for each in pending[position : position + 1] if known else pending:
                    what = f"position {position!r} of {len(pending)} twice or unasked"
                    each.group.fail(EngineError(f"{self.scorer.name} scored {what}."))
        for each in left.values():
            each.group.fail(EngineError(f"{self.scorer.name} did not score candidate {each.candidate.index}."))


class _Round:
    """Samples what the budget asked for, and scores it meanwhile."""

    def __init__(self, pipeline: Pipeline, asked: Sequence[tuple[Group, Request]], *, live: bool) -> None:
        assert pipeline.policy is not None
        self._pipeline, self._policy = pipeline, pipeline.policy
        groups = [group for group, _ in asked]
        self._schedule = pipeline.schedule_for(groups, live=live)
        single = live or any(group.watched or group.stop_at is not None for group in groups)
        together = self._schedule == "all" and not single
        self._asked = [(group, replace(request, together=together)) for group, request in asked]
        self._sampled: asyncio.Queue[Pending | None] = asyncio.Queue()  # None: sampling is over
        self._samplers: dict[asyncio.Task[None], list[Group]] = {}

    async def run(self) -> None:
        parts = [[one] for one in self._asked] if self._policy.concurrent else [list(self._asked)]
        async with asyncio.TaskGroup() as tasks:
            scoring = tasks.create_task(self._score(tasks))
            async with asyncio.TaskGroup() as sampling:
                for part in parts:
                    self._samplers[sampling.create_task(self._sample(part))] = [group for group, _ in part]
            self._sampled.put_nowait(None)
            await scoring
            if self._pipeline.scorer.needs.group:
                await self._pipeline._score([w for group, _ in self._asked for w in group.pending()])

    async def _sample(self, part: Sequence[tuple[Group, Request]]) -> None:
        """Admit what the policy returns; an error is that of the groups that still lack some of their samples."""
        groups = [group for group, _ in part]
        missing = {(i, sample) for i, (_, request) in enumerate(part) for sample in request.samples}
        try:
            stream = self._policy.generate([request for _, request in part], keep=self._keep(groups))
            async with _closing(stream) as completions:
                async for completion in completions:
                    place = (completion.request_index, completion.sample_index)
                    if place not in missing:
                        name = self._policy.name
                        raise EngineError(f"{name} returned sample {place[1]} of a prompt twice or unasked.")
                    group = groups[place[0]]
                    candidate = _candidate(completion, group.task.prefill)
                    if group.admit(candidate, _usage(completion), error=completion.error) and not group.whole:
                        self._sampled.put_nowait(Pending(group, candidate))
                    missing.remove(place)
                    if all(group.error is not None for group in groups):
                        return
        except Exception as error:
            untouched = [one for i, one in enumerate(part) if {(i, s) for s in one[1].samples} <= missing]
            if not isinstance(error, EngineError) and len(part) > 1 and len(untouched) == len(part):
                for one in part:  # whose fault it is shows when each is asked for by itself
                    await self._sample([one])
                return
            for i in {i for i, _ in missing} or range(len(groups)):
                groups[i].fail(user_error(f"the policy {self._policy.name!r}", error))
            return
        for i, _ in missing:
            got = len(groups[i].candidates)
            groups[i].fail(EngineError(f"{self._policy.name} returned {got} of {groups[i].asked} completions."))

    def _keep(self, groups: Sequence[Group]) -> Keep | None:
        if any(group.followed for group in groups):
            return lambda partial: groups[partial.request_index].follow(partial)
        if all(group.stop_at is None for group in groups):
            return None

        return Wanted(lambda index: not groups[index].over)

    async def _score(self, tasks: asyncio.TaskGroup) -> None:
        async for batch in self._batches():
            score = tasks.create_task(self._scored(batch))
            if self._schedule != "each":
                await score

    async def _scored(self, batch: Sequence[Pending]) -> None:
        await self._pipeline._score(batch)
        for sampler, groups in self._samplers.items():
            if all(group.error is not None for group in groups):
                sampler.cancel()  # nobody wants what is still being written

    async def _batches(self) -> AsyncIterator[list[Pending]]:
        """Candidates as the schedule hands them over."""
        ended = False
        held: list[Pending] = []
        while not ended:
            arrived = [await self._sampled.get()]
            while self._schedule != "each" and not self._sampled.empty():
                arrived.append(self._sampled.get_nowait())
            ended = arrived[-1] is None
            held += [pending for pending in arrived if pending is not None]
            if held and (ended or self._schedule != "all"):
                yield held
                held = []


async def score(
    scorer: Any,
    groups: Iterable[Group | tuple[Conversation | Task, Sequence[str | Candidate]]],
    *,
    prune: bool = False,
    pool: ModelPool | None = None,
) -> list[Group]:
    """Score candidates that came from elsewhere; no policy is needed, and groups are fused into the scorer's batches.

    Args:
        scorer: a ``Scorer``, or whatever ``BestOfN`` takes as one.
        groups: (prompt, candidates) pairs; or groups, whose tasks and candidates are taken, and not their scores.
        prune: whether candidates may be given up that provably cannot win; False gives every reward.
        pool: where models given by name are loaded and stay; None frees them at the end.

    Returns:
        One group for each that came in, in order: ``rewards``, ``scores``, ``result(selector)``. A group that cannot
        be scored has its ``error``.

    Raises:
        InputError: a prompt or a list of candidates that is none, or a scorer that does not exist.
    """
    own = ModelPool() if pool is None else pool
    try:
        ready = await asyncio.to_thread(own.scorer, scorer)  # loading a model takes seconds
        whole = ready.needs.group
        prune = prune and not ready.needs.all_rewards
        what = "groups are a list of (prompt, candidates) pairs, or of groups"
        pairs = [(g.task, g.candidates) if isinstance(g, Group) else g for g in several(what, groups)]
        if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
            raise InputError(f"{what}.")
        ours = [Group.of(prompt, candidates, prune=prune, whole=whole) for prompt, candidates in pairs]
        async with aclosing(Pipeline(ready).stream(ours)) as finished:
            async for _ in finished:
                pass
        return ours
    finally:
        if pool is None:
            await own.aclose()


def rank(
    scorer: Scorer,
    rows: Iterable[tuple[Conversation | Task, Sequence[str | Candidate]]],
    selector: Selector,
    *,
    prune: bool = True,
) -> AsyncGenerator[tuple[int, Result | BonError], None]:
    """Score and rank candidates that came from elsewhere; yield (position, result or error) as they finish.

    Args:
        scorer: with its models in place.
        rows: (prompt, candidates) pairs, read when they are needed.
        selector: what picks.
        prune: whether candidates may be given up that provably cannot win, where that changes nothing.
    """
    prune, whole = prune and may_prune(scorer, selector), scorer.needs.group
    groups = (made(partial(Group.of, *row, prune=prune, whole=whole)) for row in rows)
    return Pipeline(scorer).results(groups, selector)


def may_prune(scorer: Scorer, selector: Selector) -> bool:
    """Whether the selector picks the same however many losers the scorer gives up."""
    return only_the_best_counts(selector) and not scorer.needs.all_rewards


def made(make: Callable[..., Any], *args: Any) -> Any:
    """What ``make`` returns, or the error that belongs in its place."""
    try:
        return make(*args)
    except Exception as error:
        return user_error("the prompt", error)


async def in_order(outcomes: AsyncGenerator[tuple[int, T], None]) -> AsyncGenerator[tuple[int, T], None]:
    """The same (position, outcome) by position, each as soon as those before it have been."""
    waiting: dict[int, T] = {}
    following = 0
    async with aclosing(outcomes):
        async for position, outcome in outcomes:
            waiting[position] = outcome
            while following in waiting:
                yield following, waiting.pop(following)
                following += 1


@asynccontextmanager
async def _closing(stream: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Close what a scorer or an engine returned; an iterator of the user's may have nothing to close.

    Raises:
        RuntimeError: it was cancelled from within, which must not look like a cancellation of the whole run.
    """
    try:
        yield stream
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise RuntimeError("what it was waiting for was cancelled") from error
    finally:
        close = getattr(stream, "aclose", None)
        if close is not None:
            await close()


def _candidate(completion: Completion, prefill: str) -> Candidate:
    """A completion as the whole answer, which begins with the prefill."""
    pieces, logprobs = completion.pieces, completion.logprobs
    known = pieces is not None and logprobs is not None and len(pieces) == len(logprobs)
    return Candidate(
        index=completion.sample_index,
        text=prefill + completion.text if prefill and completion.error is None else completion.text,
        finish_reason=completion.finish_reason,
        tokens=None if prefill else completion.tokens,
        cumulative_logprob=completion.cumulative_logprob,
        logprobs=tuple(zip(pieces or (), logprobs or (), strict=True)) if known else None,
        completion_tokens=completion.completion_tokens or None,
        error=None if completion.error is None else str(completion.error),
        tool_calls=completion.tool_calls,
        reasoning=completion.reasoning,
        refusal=completion.refusal,
        top_logprobs=completion.top_logprobs,
    )


def _whole(more: Any) -> int:
    """What a budget asked for: an int of whatever library."""
    number = -1 if isinstance(more, bool) or not hasattr(more, "__index__") else operator.index(more)
    if number < 0:
        raise InputError(f"the budget asked for {more!r:.60} more samples; it must be a whole number >= 0.")
    return number


def _usage(completion: Completion) -> Usage:
    return Usage(
        policy_prompt_tokens=completion.prompt_tokens,
        policy_completion_tokens=completion.completion_tokens,
        cached_tokens=completion.cached_tokens,
    )


def _chunks(items: Iterable[T], enough: float, size: Callable[[T], int]) -> Iterator[list[T]]:
    """Items in lists whose sizes add up to ``enough``."""
    chunk: list[T] = []
    broken: Exception | None = None
    iterator = iter(items)
    while broken is None:
        try:
            item = next(iterator)
        except Exception as error:  # StopIteration, or what the source raised: then the items before it come first
            broken = error
        else:
            chunk.append(item)
        if chunk and (broken is not None or sum(map(size, chunk)) >= enough):
            yield chunk
            chunk = []
    if broken is not None and not isinstance(broken, StopIteration):
        raise broken
