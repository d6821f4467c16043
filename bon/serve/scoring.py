"""The reward as a service: texts that came from elsewhere are scored and ranked, in the shapes that others have.

``POST /v1/score`` is vLLM's (``text_1`` and ``text_2``, or ``queries`` and ``documents``), and for trainers takes many
prompts with their candidates at once (``groups``). ``POST /v1/rerank`` is Jina's, Cohere's (its first version) and
vLLM's. All prompts of a request are scored together in one call. A text without a reward has the score null and never
0; the ``best_of_n`` beside it says why.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

from bon.group import Callback, Follow, Group
from bon.pipeline import Pipeline
from bon.scorers.base import Scorer
from bon.selectors import Best
from bon.serve.answers import evidence, scored, usage_body
from bon.serve.failures import ApiError, api_error, bad
from bon.serve.plan import Planner, Work, as_task
from bon.serve.protocol import MESSAGE, MOST, Body, FirstError, Messages, Options, Text
from bon.task import Task
from bon.types import Result, Score, Usage


class Document(Body):
    """A text, as Cohere and Jina may have it."""

    text: str


Texts = Annotated[list[str | Document], FirstError, Field(min_length=1)]
_PROMPT_OR_TURN = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1}, MESSAGE]})]
Prompts = Text | Annotated[list[_PROMPT_OR_TURN], FirstError, Field(min_length=1)]
Several = str | Document | Texts


class ScoringOptions(Options):
    """What bon adds to the requests of others."""

    reference: str | None = Field(default=None, description="A right answer, for scorers that compare with one.")


class _Scoring(Body):
    model: str | None = Field(default=None, description="One of GET /v1/models; the first of them if left out.")
    user: str | None = None
    best_of_n: ScoringOptions | None = None

    @property
    def options(self) -> ScoringOptions:
        """The extension's fields."""
        return self.best_of_n or ScoringOptions()


class RerankRequest(_Scoring):
    """Body of ``POST /v1/rerank``: which of the documents answers the query best."""

    query: Text | Messages
    documents: Texts
    top_n: int | None = Field(default=None, ge=0, description="The n best are returned; 0 is all, as in vLLM.")
    return_documents: bool | None = Field(default=True, description="Return the texts as well.")

    @property
    def asked(self) -> list[Asked]:
        """What is to be scored."""
        return [Asked.of(self.options, "query", self.query, "documents", self.documents)]


class ScoringGroup(Body):
    """A prompt and its candidates."""

    prompt: Text | None = None
    messages: Messages | None = None
    candidates: Texts
    instruction: str | None = Field(
        default=None, min_length=1, description="The part of the last user message that is the instruction proper."
    )
    reference: str | None = Field(default=None, description="A right answer, for scorers that compare with one.")


class ScoreRequest(_Scoring):
    """Body of ``POST /v1/score``: a text or a conversation with one answer or several, pairs of texts, or groups."""

    text_1: Prompts | None = Field(default=None, description="A prompt, a conversation, or one prompt for each answer.")
    text_2: Several | None = Field(default=None, description="Its answers, or one for each prompt.")
    queries: Prompts | None = Field(default=None, description="text_1 by another name.")
    documents: Several | None = Field(default=None, description="text_2 by another name.")
    groups: Annotated[list[ScoringGroup], FirstError, Field(min_length=1)] | None = None

    @property
    def asked(self) -> list[Asked]:
        """What is to be scored: one entry for each prompt, so that a scorer sees the answers to it beside each other.

        Raises:
            ApiError: 400 for fields that contradict each other.
        """
        if self.groups is None:
            return self._pairs(*_one_of(self, "text_1", "queries"), *_one_of(self, "text_2", "documents"))
        for name in ("text_1", "text_2", "queries", "documents"):
            if getattr(self, name) is not None:
                raise bad(name, "cannot be combined with groups; give one of them.")
        for name in ("instruction", "reference"):
            if getattr(self.options, name) is not None:
                raise bad(f"best_of_n.{name}", f"belongs into each of the groups, as {name}.")
        asked = []
        for index, group in enumerate(self.groups):
            at = f"groups[{index}]."
            name, prompt = _one_of(group, "prompt", "messages", at=at)
            asked.append(Asked.of(group, at + name, prompt, f"{at}candidates", group.candidates, at))
        return asked

    def _pairs(self, at: str, prompts: Any, texts_at: str, given: Any) -> list[Asked]:
        texts = given if isinstance(given, list) else [given]
        if isinstance(prompts, str) or not isinstance(prompts[0], str):
            return [Asked.of(self.options, at, prompts, texts_at, texts)]
        if len(prompts) not in (1, len(texts)):
            raise bad(at, f"has {len(prompts)} texts and {texts_at} {len(texts)}: give one, or one for each.")
        places: dict[Any, list[int]] = {}
        for place, prompt in enumerate(prompts * len(texts) if len(prompts) == 1 else prompts):
            if not isinstance(prompt, str):
                raise bad(f"{at}[{place}]", "must be text, as those before it are.")
            places.setdefault(prompt, []).append(place)
        return [
            Asked.of(self.options, f"{at}[{own[0]}]", prompt, texts_at, [texts[i] for i in own], places=own)
            for prompt, own in places.items()
        ]


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt with texts to be scored.

    Args:
        task: the prompt.
        texts: its candidates.
        at: the request field that has them.
        places: of the candidates in the answer.
    """

    task: Task
    texts: Sequence[str]
    at: str
    places: Sequence[int]

    @classmethod
    def of(
        cls,
        about: ScoringOptions | ScoringGroup,
        at: str,
        prompt: Any,
        texts_at: str,
        texts: Sequence[str | Document],
        prefix: str = "best_of_n.",
        places: Sequence[int] | None = None,
    ) -> Asked:
        """Check what a request has, in the fields ``at`` and ``texts_at``.

        Raises:
            ApiError: 400 with the field at fault.
        """
        task = as_task(prompt, at, about.instruction, f"{prefix}instruction", about.reference)
        plain = [text if isinstance(text, str) else text.text for text in texts]
        return cls(task, plain, texts_at, range(len(plain)) if places is None else places)

    def place(self, index: int | None) -> int | None:
        """Where in the answer a candidate is."""
        return None if index is None else self.places[index]


@dataclass(frozen=True, slots=True)
class Scoring(Work):
    """Texts to be scored.

    Args:
        request: what the client sent.
        asked: what it asks for.
        rewards: the scorer.
    """

    request: ScoreRequest | RerankRequest
    asked: Sequence[Asked]
    rewards: Scorer

    @classmethod
    def of(cls, planner: Planner, request: ScoreRequest | RerankRequest) -> Scoring:
        """Check a request against what the server can do.

        Raises:
            ApiError: 400 with the field at fault, 404 for a model that is not served.
        """
        model, asked = planner.served(request.model), request.asked
        name, most = planner.offered(request.options), planner.max_n
        for one in asked:
            if len(one.texts) > most:
                said = f"has {len(one.texts)} candidates of one prompt, and this server takes {most} at most."
                raise bad(one.at, said)
        if (total := sum(len(one.texts) for one in asked)) > MOST:
            raise bad("groups", f"has {total} candidates in all, and a request may have {MOST} at most.")
        return cls(name, model, planner.deadline(request.options), {}, request, asked, planner.scorers[name])

    @property
    def n(self) -> int:
        """Candidates of all prompts."""
        return sum(len(one.texts) for one in self.asked)

    @property
    def tasks(self) -> Sequence[Task]:
        """The prompts."""
        return [one.task for one in self.asked]

    async def run(self, deadline: float | None, tell: Callback, follow: Follow) -> list[Result | Exception]:
        """Score everything in one call; a prompt that cannot be scored has its error.

        Raises:
            Exception: of the first prompt, where none could be scored.
        """
        whole = self.rewards.needs.group
        groups = [Group.of(one.task, one.texts, whole=whole) for one in self.asked]
        await Pipeline(self.rewards).run(groups, deadline)
        outcomes = [self._outcome(group) for group in groups]
        if not any(isinstance(outcome, Result) for outcome in outcomes) and isinstance(outcomes[0], Exception):
            raise outcomes[0]
        return outcomes

    def _outcome(self, group: Group) -> Result | Exception:
        try:
            result = group.result(Best())
        except Exception as error:
            return error
        if set(result.counts) == {"late"}:
            said = f"the deadline of {self.deadline_s:g} s passed before any candidate was scored."
            return ApiError(408, said, "deadline_exceeded", "best_of_n.deadline_s")
        return result

    def answer(self, outcomes: Sequence[Result | Exception], queue_s: float) -> dict[str, Any]:
        """The response."""
        results = [outcome for outcome in outcomes if isinstance(outcome, Result)]
        rewards = [self._rewards(one, outcome) for one, outcome in zip(self.asked, outcomes, strict=True)]
        about = [
            evidence(outcome, self, queue_s) | {"best": one.place(outcome.best)}
            if isinstance(outcome, Result)
            else None
            for one, outcome in zip(self.asked, outcomes, strict=True)
        ]
        usage = usage_body(sum((result.usage for result in results), Usage()))
        head = {"id": "score-" + secrets.token_hex(12), "model": self.model, "usage": usage}
        if isinstance(self.request, RerankRequest):
            items = self._ranked(results[0], rewards[0])[: self.request.top_n or None]
            return {**head, "results": items, "best_of_n": about[0]}
        grouped = self.request.groups is not None
        data = _groups(outcomes, rewards) if grouped else _flat([item for own in rewards for item in own])
        return {**head, "object": "list", "created": int(time.time()), "data": data, "best_of_n": about}

    def _rewards(self, one: Asked, outcome: Result | Exception) -> list[dict[str, Any]]:
        """What is known of each candidate's reward; of those that were not scored, why."""
        if isinstance(outcome, Result):
            scores = outcome.scores
        else:
            said = api_error(outcome).message
            scores = tuple(Score(None, "failed", said, candidate=i) for i in range(len(one.texts)))
        known = [scored(score, one.task) for score in scores]
        return [item | {name: one.place(item[name]) for name in ("index", "same_as")} for item in known]

    def _ranked(self, result: Result, rewards: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        [one], shown = self.asked, self.request.return_documents  # type: ignore[union-attr]
        return [
            {
                "index": index,
                "relevance_score": rewards[index]["reward"],
                **({} if shown is False else {"document": {"text": one.texts[index]}}),
                "best_of_n": rewards[index],
            }
            for index in result.selection.ranking
        ]


def _flat(rewards: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    ordered = sorted(rewards, key=lambda item: item["index"])
    return [{"index": i["index"], "object": "score", "score": i["reward"], "best_of_n": i} for i in ordered]


def _groups(outcomes: Sequence[Result | Exception], rewards: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [
        {
            "index": index,
            "object": "score.group",
            "scores": [item["reward"] for item in own],
            "error": None if isinstance(outcome, Result) else api_error(outcome).body["error"],
            "best_of_n": own,
        }
        for index, (outcome, own) in enumerate(zip(outcomes, rewards, strict=True))
    ]


def _one_of(body: Body, *names: str, at: str = "") -> tuple[str, Any]:
    """The one field of these that is given, and its value.

    Raises:
        ApiError: 400 for none or both.
    """
    given = [(name, value) for name in names if (value := getattr(body, name)) is not None]
    if len(given) != 1:
        problem = "is given together with" if given else "is missing; give it, or"
        raise bad(at + names[0], f"{problem} {' and '.join(names[1:])}.")
    return given[0]
