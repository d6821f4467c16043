"""A checked request, as what is to be run."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

from bon.best_of_n import BestOfN
from bon.budget import Budget, Fixed, StopAt, as_budget
from bon.credit import refuse
from bon.engines.base import Classifies, Embeds, Remote
from bon.engines.function import FunctionEngine
from bon.errors import InputError
from bon.group import Callback, Follow
from bon.models import MINI
from bon.scorers.base import ModelScorer, Scorer, can
from bon.serve.failures import ApiError, bad, public
from bon.serve.protocol import ChatRequest, CompletionRequest, Options
from bon.serve.settings import Settings
from bon.spec import SCORERS
from bon.task import Conversation, Task
from bon.types import Result, Sampling

log = logging.getLogger("bon.serve")

_NAMED = re.compile(r"([\w.-]+)=(.+)")


@dataclass(frozen=True, slots=True)
class Work(ABC):
    """What is run for one request, of whatever endpoint.

    Args:
        scorer: name of the scorer.
        model: name that the response carries.
        deadline_s: seconds from arrival.
        passed: fields, by their paths, that the policy's engine is to honour.
    """

    scorer: str
    model: str
    deadline_s: float | None
    passed: Mapping[str, Any]

    @property
    @abstractmethod
    def n(self) -> int | None:
        """Candidates at most, where that is known."""

    @property
    @abstractmethod
    def tasks(self) -> Sequence[Task]:
        """The prompts."""

    @abstractmethod
    async def run(self, deadline: float | None, tell: Callback, follow: Follow) -> Any:
        """Do it: a ``Result``, or for many prompts a list in which errors stand for some of them.

        Args:
            deadline: seconds that are left.
            tell, follow: as for ``BestOfN.run``, where the client can be told.
        """


@dataclass(frozen=True, slots=True)
class Plan(Work):
    """A completion.

    Args:
        request: what the client sent.
        task: its prompt.
        bon: best-of-N with the request's settings, on the server's engines.
    """

    request: ChatRequest | CompletionRequest
    task: Task
    bon: BestOfN

    @property
    def chat(self) -> bool:
        """Which of the two endpoints."""
        return isinstance(self.request, ChatRequest)

    @property
    def n(self) -> int | None:
        """Candidates at most, where that is known."""
        return self.bon.n

    @property
    def tasks(self) -> Sequence[Task]:
        """The prompt."""
        return (self.task,)

    async def run(self, deadline: float | None, tell: Callback, follow: Follow) -> Result:
        """Sample, score, select, and rate the winner again without each of its sentences."""
        live = self.request.stream and self.request.options.return_candidates
        result = await self.bon.run(self.task, callback=tell, follow=follow if live else None, deadline=deadline)
        if not self.request.options.credit:
            return result
        left = None if deadline is None else max(0.0, deadline - result.timing.total)
        return await self.bon.run_credit(result, deadline=left)


@dataclass(frozen=True)
class Planner:
    """Turns requests into plans, or refuses them.

    Args:
        bon: the server's models and defaults.
        scorers: by name; the first is the default.
        settings: names to answer to, and limits.
    """

    bon: BestOfN
    scorers: Mapping[str, Scorer]
    settings: Settings

    @property
    def models(self) -> tuple[str, ...]:
        """Names to answer to; the first is the one that responses carry.

        Raises:
            ApiError: 503 while a server behind this one has not said what its model is called.
        """
        name = self.bon.policy.name
        if not self.settings.model_names and isinstance(self.bon.policy, Remote) and "://" in name:
            raise ApiError(
                503, "the model's server has not answered yet.", "engine_error", headers={"retry-after": "5"}
            )
        return self.settings.model_names or (public_name(name),)

    def plan(self, request: ChatRequest | CompletionRequest) -> Plan:
        """Check a request against what the server can do.

        Raises:
            ApiError: 400 with the field at fault, 404 for a model that is not served.
        """
        model = self.served(request.model)
        if request.stream_options is not None and not request.stream:
            raise bad("stream_options", "is for requests with stream=true.")
        options = request.options
        name = self.offered(options)
        if options.credit:
            try:
                refuse(self.scorers[name])
            except InputError as error:
                raise bad("best_of_n.credit", str(error)) from error
        budget = self._budget(request)
        try:
            if fits := getattr(budget, "fits", None):
                fits(self.scorers[name], self.bon.selector)
        except InputError as error:
            raise bad(request.candidates[0], str(error)) from error
        bon = self.bon.replace(
            n=budget,
            sampling=self._sampling(request),
            scorer=self.scorers[name],
            min_reward=options.min_reward,
            prune=self.bon.prune and request.returned == 1,
        )
        task = self._task(request)
        passed = request.passed | _about_tools(task)
        return Plan(name, model, self.deadline(options), passed, request, task, bon)

    def served(self, name: str | None) -> str:
        """The name that a response carries.

        Raises:
            ApiError: 404 for a model that is not served.
        """
        if name is not None:
            self.check_model(name)
        return name or self.models[0]

    def offered(self, options: Options) -> str:
        """The name of the scorer that a request wants.

        Raises:
            ApiError: 400 for one that is not offered.
        """
        name = options.scorer or next(iter(self.scorers))
        if name not in self.scorers:  # a listed name, never a spec: a request loads no model and imports nothing
            raise bad("best_of_n.scorer", f"there is no scorer {name!r:.100}; there is {', '.join(self.scorers)}.")
        return name

    def check_model(self, name: str) -> None:
        """Raise a 404 for a model that is not served."""
        if name not in self.models:
            served = ", ".join(repr(name) for name in self.models)
            message = f"there is no model {name!r:.100}; this server has {served}."
            raise ApiError(404, message, "model_not_found", "model")

    @property
    def max_n(self) -> int:
        """Candidates that a request may ask for: never fewer than the server samples by itself."""
        return max(self.settings.max_n, self.bon.n or 0)

    def _budget(self, request: ChatRequest | CompletionRequest) -> Budget:
        options, k, own = request.options, request.returned, self.bon.budget
        name, n = request.candidates
        stop_at = options.stop_at
        if n is None and stop_at is None and k <= getattr(own, "least", 1):
            return own
        if stop_at is not None and k > 1:
            raise bad("best_of_n.stop_at", f"cannot be combined with n={k}: the {k} best need every reward.")
        if isinstance(n, str):
            if stop_at is not None:
                raise bad("best_of_n.stop_at", f"cannot be combined with best_of_n.n={n!r:.100}, only with a number.")
            try:
                budget = as_budget(n)
            except InputError as error:
                raise bad(name, str(error)) from error
        else:
            stop_at = getattr(own, "stop_at", None) if stop_at is None and k == 1 else stop_at
            most = n or max(self.bon.n or k, k)
            budget = Fixed(most) if stop_at is None else StopAt(stop_at, most)
        limit = getattr(budget, "most", None)
        if limit is None or limit > self.max_n:
            said = "has no limit" if limit is None else f"is {limit}"
            raise bad(name, f"{said}, and this server samples {self.max_n} candidates at most.")
        if k > 1 and not isinstance(budget, Fixed) and getattr(budget, "least", 1) < k:
            raise bad(name, f"is {n!r:.100}, but the {k} best (n={k}) need every reward: give a number.")
        if limit < k:
            raise bad("n", f"is {k}, but only {name}={limit} candidates are to be sampled.")
        return budget

    def _task(self, request: ChatRequest | CompletionRequest) -> Task:
        name = "messages" if isinstance(request, ChatRequest) else "prompt"
        task = as_task(request.conversation, name, request.options.instruction, "best_of_n.instruction")
        if isinstance(request, ChatRequest):
            for name, wanted in (
                ("continue_final_message", bool(task.prefill)),
                ("add_generation_prompt", not task.prefill),
            ):
                if getattr(request, name) not in (None, wanted):
                    said = "a last message of the assistant is continued, and no other"
                    raise bad(name, f"can only be {str(wanted).lower()} here: {said}.")
        return task

    def _sampling(self, request: ChatRequest | CompletionRequest) -> Sampling:
        names = ("temperature", "top_p", "top_k", "min_p", "seed")
        given = {name: getattr(request, name) for name in names} | {"max_tokens": request.length, "stop": request.stops}
        return self.bon.sampling.replace(
            **{name: value for name, value in given.items() if value is not None},
            logprobs=request.logprobs is not None and request.logprobs is not False,
            extra={**self.bon.sampling.extra, **request.passed},
        )

    def deadline(self, options: Options) -> float | None:
        """Seconds that a request may take.

        Raises:
            ApiError: 400 for more than the server allows.
        """
        asked, most = options.deadline_s, self.settings.deadline_s
        if asked is not None and most is not None and asked > most:
            raise bad("best_of_n.deadline_s", f"is {asked:g}, and this server allows {most:g} s at most.")
        return most if asked is None else asked


def as_task(
    prompt: Conversation, at: str, instruction: str | None, instruction_at: str, reference: str | None = None
) -> Task:
    """Check a prompt and its instruction, which are in the fields ``at`` and ``instruction_at`` of a request.

    Raises:
        ApiError: 400 with the field at fault.
    """
    try:
        task = replace(Task.of(prompt), reference=reference)
    except InputError as error:
        if error.field is None:
            raise bad(at, str(error)) from error
        raise bad(error.field.replace("messages", at, 1), str(error).replace("messages", at, 1)) from error
    try:
        return Task.of(task, instruction)
    except InputError as error:
        raise bad(instruction_at, str(error)) from error


def _about_tools(task: Task) -> dict[str, Any]:
    """Path -> value of what the messages hold that only a policy behind HTTP can read."""
    turns = enumerate(task.messages)
    return {f"messages[{i}].{name}": value for i, turn in turns for name, value in turn.about_tools.items()}


def public_name(name: str) -> str:
    """What clients call a model: a folder's own name without its path, "bon-mini" for the embedded model."""
    return "bon-mini" if name == MINI else Path(name).name if name.startswith(("/", ".", "~")) else name


def offered_scorers(bon: BestOfN) -> dict[str, Scorer]:
    """The scorers that requests may name: the server's own first, then what else can run on the models it has.

    A scorer has the name under which it is registered; one of the user's own has its ``name``.
    """
    own, others = public(bon.scorer.name), dict[str, Scorer]()
    engines = [bon.scorer.engine] if isinstance(bon.scorer, ModelScorer) else []
    engines += [] if isinstance(bon.policy, FunctionEngine) else [bon.policy]
    for name in SCORERS:
        try:
            kind = SCORERS.load(name)
            if kind is type(bon.scorer):
                own = name
            elif (
                isinstance(kind, type)
                and issubclass(kind, ModelScorer)
                and next(iter(signature(kind).parameters)) == "model"
            ):
                # Whether a server's model has a classification head, or embeds, shows when it is asked.
                unknown = kind.ability in (Classifies, Embeds)
                able = [e for e in engines if can(e, kind.ability) and not (unknown and isinstance(e, Remote))]
                others |= {name: SCORERS.construct(name, able[:1], {})} if able else {}
        except Exception as error:  # of another package, whose code may raise anything
            log.warning("the scorer %r is not offered: %s", name, error)
    return {own: bon.scorer} | {name: scorer for name, scorer in others.items() if name != own}


def further_scorers(bon: BestOfN, own: str, named: Sequence[str]) -> dict[str, Scorer]:
    """The scorers of ``Settings.scorers``, loaded.

    Args:
        bon: on whose models they run where they name none.
        own: name of the server's own.
        named: as in ``Settings``.

    Raises:
        InputError: two of one name.
        BonError: one of them does not exist, or its models cannot be had.
    """
    found: dict[str, Scorer] = {}
    for text in named:
        name, spec = match.groups() if (match := _NAMED.fullmatch(text)) else (text.partition(":")[0], text)
        if name == own or name in found:
            raise InputError(f"two scorers of the server are called {name!r}. Write ANOTHER_NAME={spec}.")
        found[name] = bon.another(spec)
    return found
