"""A checked request, as what is to be run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

from bon.best_of_n import BestOfN
from bon.budget import Budget, Fixed, StopAt, as_budget
from bon.engines.function import FunctionEngine
from bon.errors import InputError
from bon.scorers.base import ModelScorer, Scorer
from bon.serve.failures import ApiError, bad
from bon.serve.protocol import ChatRequest, CompletionRequest
from bon.serve.settings import Settings
from bon.spec import SCORERS
from bon.task import Task
from bon.types import Sampling

log = logging.getLogger("bon.serve")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run for one request.

    Args:
        request: what the client sent.
        task: its prompt.
        bon: best-of-N with the request's settings, on the server's engines.
        scorer: name of the scorer.
        model: name that the response carries.
        deadline_s: seconds from arrival.
        passed: fields, by their paths, that the policy's engine is to honour.
    """

    request: ChatRequest | CompletionRequest
    task: Task
    bon: BestOfN
    scorer: str
    model: str
    deadline_s: float | None
    passed: Mapping[str, Any]

    @property
    def chat(self) -> bool:
        """Which of the two endpoints."""
        return isinstance(self.request, ChatRequest)


@dataclass(frozen=True)
class Planner:
    """Turns requests into plans, or refuses them.

    Args:
        bon: the server's models and defaults.
        scorers: by name; the first is the default.
        models: names to answer to; the first is the one that responses carry.
        settings: limits.
    """

    bon: BestOfN
    scorers: Mapping[str, Scorer]
    models: tuple[str, ...]
    settings: Settings

    def plan(self, request: ChatRequest | CompletionRequest) -> Plan:
        """Check a request against what the server can do.

        Raises:
            ApiError: 400 with the field at fault, 404 for a model that is not served.
        """
        if request.model is not None:
            self.check_model(request.model)
        if request.stream_options is not None and not request.stream:
            raise bad("stream_options", "is for requests with stream=true.")
        options = request.options
        name = options.scorer or next(iter(self.scorers))
        if name not in self.scorers:  # a listed name, never a spec: a request loads no model and imports nothing
            raise bad("best_of_n.scorer", f"there is no scorer {name!r:.100}; there is {', '.join(self.scorers)}.")
        bon = self.bon.replace(
            n=self._budget(request),
            sampling=self._sampling(request),
            scorer=self.scorers[name],
            min_reward=options.min_reward,
            prune=self.bon.prune and request.returned == 1,
        )
        passed = request.passed | (request.about_tools if isinstance(request, ChatRequest) else {})
        model = request.model or self.models[0]
        return Plan(request, self._task(request), bon, name, model, self._deadline(options.deadline_s), passed)

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
        if n is None and stop_at is None and k == 1:
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
        if k > 1 and not isinstance(budget, Fixed):
            raise bad(name, f"is {n!r:.100}, but the {k} best (n={k}) need every reward: give a number.")
        if limit < k:
            raise bad("n", f"is {k}, but only {name}={limit} candidates are to be sampled.")
        return budget

    def _task(self, request: ChatRequest | CompletionRequest) -> Task:
        name = "messages" if isinstance(request, ChatRequest) else "prompt"
        try:
            task = Task.of(request.conversation)
            name = "best_of_n.instruction"
            return Task.of(task, request.options.instruction)
        except InputError as error:
            raise bad(name, str(error)) from error

    def _sampling(self, request: ChatRequest | CompletionRequest) -> Sampling:
        names = ("temperature", "top_p", "top_k", "min_p", "seed")
        given = {name: getattr(request, name) for name in names} | {"max_tokens": request.length, "stop": request.stops}
        return self.bon.sampling.replace(
            **{name: value for name, value in given.items() if value is not None},
            logprobs=request.logprobs is not None and request.logprobs is not False,
            extra={**self.bon.sampling.extra, **request.passed},
        )

    def _deadline(self, asked: float | None) -> float | None:
        most = self.settings.deadline_s
        if asked is not None and most is not None and asked > most:
            raise bad("best_of_n.deadline_s", f"is {asked:g}, and this server allows {most:g} s at most.")
        return most if asked is None else asked


def offered_scorers(bon: BestOfN) -> dict[str, Scorer]:
    """The scorers that requests may name: the server's own first, then what else can run on the models it has.

    A scorer has the name under which it is registered; one of the user's own has its ``name``.
    """
    own, others = bon.scorer.name, dict[str, Scorer]()
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
                able = [engine for engine in engines if isinstance(engine, kind.ability)]
                others |= {name: SCORERS.construct(name, able[:1], {})} if able else {}
        except Exception as error:  # of another package, whose code may raise anything
            log.warning("the scorer %r is not offered: %s", name, error)
    return {own: bon.scorer} | {name: scorer for name, scorer in others.items() if name != own}
