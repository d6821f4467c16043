"""Judges: a model rates each response, compares them in pairs, or picks the best of a list.

The FLIP paper's baselines (arXiv 2602.13551). All questions of a round, of all tasks of a call, are one batch of the
engine. Where the engine gives log-probabilities, an answer counts with the probability of each value that could have
stood in its place, behind the judge's own reasoning: the expected rating, the share of each response.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from bon.engines.base import Completion, Engine, Generates, Prompt, Rates, Request, Turn, Wanted, WritesJSON
from bon.errors import InputError, UnknownNameError, whole_number
from bon.prompts.judging import Judging, load_judging
from bon.scorers.base import ModelScorer, Needs, Pending, by_group, can
from bon.scorers.judge.contests import Wins, all_pairs, knockout, listed, pivot, rated
from bon.scorers.judge.questions import Case, Question
from bon.scorers.judge.verdict import KEYS, UNRATED, Verdict, choices, read, schema
from bon.scorers.parsing import NO_RESPONSE, response_piece
from bon.types import Sampling, Score

if TYPE_CHECKING:
    from bon.models import Model

Pairs = Literal["all", "knockout", "pivot"]
MAX_TOKENS = 256
"""Tokens of a judge's answer: a short reasoning and the verdict."""


class Judge(ModelScorer):
    """Scores candidates by what a model says of them.

    A candidate about which nothing that the judge said could be read has no reward. "pairwise" and "listwise" need two
    different candidates: with one there is nothing to compare, and no reward.

    Args:
        model: as in ``Flip``.
        style: "pointwise" (the reward is a rating from 1 to 10), "pairwise" (the share of comparisons won) or
            "listwise" (the share of orders in which it is the best); a folder with templates of your own, or a
            ``Judging`` (``bon.prompts.judging.judging_from_files``).
        criteria: what to judge by, each asked for by itself and the answers averaged: a list, a file with one a line,
            or text that divides them with " + ". None: everything at once.
        times: answers to each question, averaged; for "listwise", orders in which the list is shown.
        pairs: "all"; "knockout" (one comparison fewer than candidates); "pivot" (a ring, then everybody against the
            ``pivots`` best of it).
        pivots: see ``pairs``.
        reasoning: whether the judge says first what decides. Without, nothing is sampled: each value that it could name
            is rated by its probability, which is all that a very small model can do; it needs log-probabilities.
        expected: whether the values that the judge did not say count with their probability, where the engine gives
            log-probabilities; it costs a prefill of the answer for each value.
        sampling: how answers are sampled: a ``Sampling``, or what is to differ from the usual (greedy for one answer,
            temperature 1 for several, 256 tokens).
        thinking: whether the model may think before it answers.
        options: passed on when a model is loaded by name.

    Raises:
        UnknownNameError: a style or a way of pairing that does not exist.
        InputError: criteria that are none or that the templates have no place for, times or pivots < 1.
    """

    ability: ClassVar[type] = Generates

    def __init__(
        self,
        model: str | Path | Model | Engine | Callable[..., Any] | None = None,
        *,
        style: str | Path | Judging = "pointwise",
        criteria: str | Path | Sequence[str] | None = None,
        times: int = 1,
        pairs: Pairs = "all",
        pivots: int = 2,
        reasoning: bool = True,
        expected: bool = True,
        sampling: Sampling | Mapping[str, Any] | None = None,
        thinking: bool = False,
        **options: Any,
    ) -> None:
        if pairs not in get_args(Pairs):
            raise UnknownNameError("way of pairing", pairs, get_args(Pairs))
        self.style = load_judging(style)
        self.criteria = _criteria(criteria)
        if self.criteria != ("",) and not self.style.knows("criterion"):
            raise InputError(f"the templates of {self.style.name!r} have no {{criterion}}, so criteria= says nothing.")
        self.times, self.pairs, self.pivots = whole_number("times", times, 1), pairs, whole_number("pivots", pivots, 1)
        self.reasoning, self.expected, self.thinking = reasoning, expected or not reasoning, thinking
        pointwise, single = self.style.kind == "pointwise", times == 1 or self.style.kind == "listwise"
        self.range = (1.0, 10.0) if pointwise else (0.0, 1.0)
        usual = Sampling(temperature=0.0 if single else 1.0, max_tokens=MAX_TOKENS)
        if not isinstance(sampling, Sampling):
            sampling = Sampling.of({**usual.to_dict(), **(sampling or {})})
        self.sampling = sampling
        super().__init__(model, options)

    def _able(self, engine: Engine) -> Engine:
        if not self.reasoning and not can(engine, Rates):
            raise InputError(f"reasoning=false needs a model that gives log-probabilities; {engine.name!r} cannot.")
        return super()._able(engine)

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        """Whole groups for a judge that compares; only all pairs can be given up one by one."""
        compares = self.style.kind != "pointwise"
        prunes = self.style.kind == "pairwise" and self.pairs == "all" and not self.expected
        return Needs(group=compares, all_rewards=compares and not prunes)

    @property
    def name(self) -> str:
        """Style and model."""
        way = f"-{self.pairs}" if self.style.kind == "pairwise" and self.pairs != "all" else ""
        return f"judge-{self.style.name}{way}({self._model_name})"

    async def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Score every candidate once; see ``Scorer.score``."""
        compares = self.style.kind != "pointwise"
        cases: list[Case] = []
        for positions in by_group(pending) if compares else [[position] for position in range(len(pending))]:
            case = Case(pending[positions[0]])
            for position in positions:
                response = response_piece(pending[position].candidate)
                if response is None:
                    yield position, NO_RESPONSE
                else:
                    case.add(position, response)
            if compares and len(case.entrants) == 1:
                reason = (
                    f"there is nothing to compare for a {self.style.kind} judge; style=pointwise rates a single one"
                )
                for position in case.entrants[0][1]:
                    yield position, Score(None, "failed", reason)
            elif case.entrants:
                cases.append(self._begun(case))
        while cases:
            await self._round(cases)
            for case in cases:
                for found in case.scores() if case.rewards is not None else ():
                    yield found
            cases = [case for case in cases if case.rewards is None]

    def _begun(self, case: Case, fits: int | None = None) -> Case:
        """Start the contest of a task."""
        entrants = case.draw()
        if self.style.kind == "pointwise":
            case.contest = rated(entrants)
        elif self.style.kind == "listwise":
            drawn = random.Random(case.pending.task.instruction)
            case.contest = listed([tuple(drawn.sample(range(entrants), entrants)) for _ in range(self.times)], fits)
        elif self.pairs == "all":
            case.contest = all_pairs(entrants)
            case.wins = Wins(entrants) if case.pending.group.prune and not self.needs.all_rewards else None
        else:
            case.contest = knockout(entrants) if self.pairs == "knockout" else pivot(entrants, self.pivots)
        case.shown = next(case.contest)
        return case

    async def _round(self, cases: Sequence[Case]) -> None:
        """Ask the questions of one round of all contests as one batch, and send each its answers."""
        asked = {case: [Question(case, shown) for shown in case.shown] for case in cases}
        await self._ask([question for questions in asked.values() for question in questions])
        for case, questions in asked.items():
            too_long = max((len(question.shown) for question in questions if question.too_long), default=0)
            if too_long > 2:  # lists, which can be shorter
                self._begun(case, fits=max(2, too_long // 2))
                continue
            case.asked += questions
            try:
                case.shown = case.contest.send([question.weights for question in questions])
            except StopIteration as ended:
                case.rewards = ended.value

    async def _ask(self, questions: Sequence[Question]) -> None:
        """Have every question answered, for each criterion and as often as it is to be."""
        times = 1 if self.style.kind == "listwise" else self.times
        asked = [(question, criterion) for question in questions for criterion in self.criteria]
        requests = []
        for question, criterion in asked:
            responses = [question.case.entrants[entrant][0] for entrant in question.shown]
            prompt = self.style.prompt(
                question.case.pending.task, responses, criterion, {"enable_thinking": self.thinking}
            )
            requests.append(Request(prompt, self._held(len(responses)), times, together=True))
        stoppable = any(q.case.wins is not None or q.case.pending.group.stop_at is not None for q in questions)
        keep = Wanted(lambda index: asked[index][0].wanted) if stoppable else None
        open_: list[_Open] = []
        if not self.reasoning:
            before, after = self._answer
            for (question, _), request in zip(asked, requests, strict=True):
                open_.append(_Open(question, len(question.verdicts), request.prompt, before, after))
                question.verdicts.append(UNRATED)
            return await self._expect(open_)
        async with aclosing(self.engine.generate(requests, keep=keep)) as completions:
            async for completion in completions:
                question, prompt = asked[completion.request_index][0], requests[completion.request_index].prompt
                verdict = self._read(len(question.shown), completion)
                if verdict.weights is not None:
                    (start, end), text = verdict.span, completion.text
                    open_.append(_Open(question, len(question.verdicts), prompt, text[:start], text[end : end + 1]))
                question.take(completion, verdict, times * len(self.criteria))
        if self.expected and can(self.engine, Rates) and open_:
            with contextlib.suppress(InputError):  # a server that gives no log-probabilities: answers count as they are
                await self._expect(open_)

    def _held(self, shown: int) -> Sampling:
        """Hold the engine to the schema of bon's own templates where it can be held, and need not think first."""
        if not self.style.headings or self.thinking or not isinstance(self.engine, WritesJSON):
            return self.sampling
        held = self.engine.json_options(schema(self.style.kind, shown))
        return self.sampling.replace(extra={**held, **self.sampling.extra})

    def _read(self, shown: int, completion: Completion) -> Verdict:
        if completion.error is not None:
            return Verdict(None, "failed", str(completion.error))
        if completion.finish_reason == "abort":
            return Verdict(None, "pruned", "it could not win any more")
        return read(self.style.kind, shown, completion.text, completion.finish_reason)

    @property
    def _answer(self) -> tuple[str, str]:
        """What stands around the value in an answer without reasoning."""
        quote = '"' if self.style.kind == "pairwise" else ""
        key = KEYS[self.style.kind]
        return (f'{{"{key}": {quote}', f"{quote}}}") if self.style.headings else ("", "")

    async def _expect(self, open_: Sequence[_Open]) -> None:
        """Let every value that the judge could have named in a place count with its probability."""
        values = [choices(self.style.kind, len(each.question.shown)) for each in open_]
        # What stands before the place belongs to the prompt, which is read once for all values. White space at its end
        # does not: some chat templates trim a message.
        begun = [each.before.rstrip() for each in open_]
        asked = [_begins(each.prompt, text) for each, text in zip(open_, begun, strict=True)]
        prompts = [prompt for prompt, some in zip(asked, values, strict=True) for _ in some]
        texts = [
            each.before[len(text) :] + value + each.after
            for each, text, some in zip(open_, begun, values, strict=True)
            for value in some
        ]
        found = iter(await self.engine.loglikelihood(prompts, texts, end=False))
        for each, some in zip(open_, values, strict=True):
            worth = [float(value) for value in some] if self.style.kind == "pointwise" else None
            each.question.expect(each.at, [next(found) for _ in some], worth)


@dataclass(frozen=True, slots=True)
class _Open:
    """A place in a judge's answer where other values could stand: which verdict, and the text around it."""

    question: Question
    at: int
    prompt: Prompt
    before: str
    after: str


def _begins(prompt: Prompt, text: str) -> Prompt:
    """The prompt with a beginning of its answer."""
    return replace(prompt, turns=(*prompt.turns, Turn("assistant", (text,)))) if text else prompt


def _criteria(given: str | Path | Sequence[str] | None) -> tuple[str, ...]:
    """The criteria as texts; one that is empty where everything is judged at once."""
    if given is None:
        return ("",)
    where = "criteria="
    if isinstance(given, Path) or (isinstance(given, str) and Path(given).is_file()):
        where = str(given)
        try:
            given = Path(given).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the criteria file {where} cannot be read: {error}.") from error
    elif isinstance(given, str):
        given = given.split(" + ")
    criteria = tuple(str(one).strip() for one in given if str(one).strip())
    if not criteria:
        raise InputError(f"there are no criteria in {where}: write one a line.")
    return criteria
