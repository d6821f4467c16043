"""A checked request, as what is to be run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bon.best_of_n import BestOfN
from bon.errors import InputError
from bon.scorers import BackwardLikelihood, Flip
from bon.scorers.base import Scorer
from bon.serve.failures import ApiError, bad
from bon.serve.protocol import ChatRequest, CompletionRequest
from bon.serve.settings import Settings
from bon.task import Task
from bon.types import Sampling


@dataclass(frozen=True, slots=True)
class Plan:
    """What one request asks for.

    Args:
        task: the prompt.
        bon: best-of-N with the request's settings, on the server's engines.
        scorer: name of the scorer.
        model: name that the response carries.
        chat: which of the two endpoints.
        k: how many are returned.
        stream, stream_usage: whether as a stream, and whether that ends with the usage.
        logprobs: whether the tokens of the answer come with their log-probabilities.
        return_candidates: whether all candidates are returned.
        deadline_s: seconds from arrival.
        min_reward: whether there is one, so that the answer may be refused.
        passed: fields, by their paths, that the policy's engine is to honour.
    """

    task: Task
    bon: BestOfN
    scorer: str
    model: str
    chat: bool
    k: int
    stream: bool
    stream_usage: bool
    logprobs: bool
    return_candidates: bool
    deadline_s: float | None
    min_reward: bool
    passed: Mapping[str, Any]


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
        options, k = request.options, request.n or 1
        n = self._candidates(request, k)
        stop_at, prune = options.stop_at if options.stop_at is not None else self.bon.stop_at, self.bon.prune
        if k > 1:  # the k best are known only when every reward is
            if options.stop_at is not None:
                raise bad("best_of_n.stop_at", f"cannot be combined with n={k}: the {k} best need every reward.")
            stop_at, prune = None, False
        name = options.scorer or next(iter(self.scorers))
        if name not in self.scorers:
            raise bad("best_of_n.scorer", f"there is no scorer {name!r:.100}; there is {', '.join(self.scorers)}.")
        return Plan(
            task=self._task(request),
            bon=self.bon.replace(
                n=n,
                sampling=self._sampling(request),
                scorer=self.scorers[name],
                min_reward=options.min_reward,
                prune=prune,
                stop_at=stop_at,
            ),
            scorer=name,
            model=request.model or self.models[0],
            chat=isinstance(request, ChatRequest),
            k=k,
            stream=bool(request.stream),
            stream_usage=bool(request.stream_options and request.stream_options.include_usage),
            logprobs=_wants_logprobs(request),
            return_candidates=options.return_candidates,
            deadline_s=self._deadline(options.deadline_s),
            min_reward=options.min_reward is not None,
            passed=request.passed | (request.about_tools if isinstance(request, ChatRequest) else {}),
        )

    def check_model(self, name: str) -> None:
        """Raise a 404 for a model that is not served."""
        if name not in self.models:
            served = ", ".join(repr(name) for name in self.models)
            message = f"there is no model {name!r:.100}; this server has {served}."
            raise ApiError(404, message, "model_not_found", "model")

    def _candidates(self, request: ChatRequest | CompletionRequest, k: int) -> int:
        asked = {"best_of_n.n": request.options.n}
        if isinstance(request, CompletionRequest):
            asked["best_of"] = request.best_of
            if None not in asked.values() and len(set(asked.values())) > 1:
                raise bad("best_of", "contradicts best_of_n.n; give one of them.")
        name, n = next(((name, n) for name, n in asked.items() if n is not None), ("n", max(self.bon.n, k)))
        if n > self.settings.max_n:
            raise bad(name, f"is {n}, and this server samples {self.settings.max_n} candidates at most.")
        if n < k:
            raise bad("n", f"is {k}, but only {name}={n} candidates are to be sampled.")
        return n

    def _task(self, request: ChatRequest | CompletionRequest) -> Task:
        name = "messages" if isinstance(request, ChatRequest) else "prompt"
        instruction = request.options.instruction
        prompt = [m.message for m in request.messages] if isinstance(request, ChatRequest) else request.text
        try:
            task = Task.of(prompt)
        except InputError as error:
            raise bad(name, str(error)) from error
        if instruction is None:
            return task
        try:
            return Task.of(prompt, instruction)
        except InputError as error:
            raise bad("best_of_n.instruction", str(error)) from error

    def _sampling(self, request: ChatRequest | CompletionRequest) -> Sampling:
        given: dict[str, Any] = {
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "min_p": request.min_p,
            "max_tokens": request.length,
            "stop": request.stops,
            "seed": request.seed,
        }
        sampling = replace(self.bon.sampling, **{k: v for k, v in given.items() if v is not None})
        sampling = sampling.replace(logprobs=_wants_logprobs(request))
        return sampling.replace(extra={**sampling.extra, **request.passed})

    def _deadline(self, asked: float | None) -> float | None:
        most = self.settings.deadline_s
        if asked is not None and most is not None and asked > most:
            raise bad("best_of_n.deadline_s", f"is {asked:g}, and this server allows {most:g} s at most.")
        return most if asked is None else asked


def _wants_logprobs(request: ChatRequest | CompletionRequest) -> bool:
    """Whether they are wanted; those of tokens that were not chosen cannot be had."""
    chat = isinstance(request, ChatRequest)
    name, others = ("top_logprobs", request.top_logprobs) if chat else ("logprobs", request.logprobs)  # type: ignore[union-attr]
    if others:
        raise bad(name, "is 0 at most here: only the chosen tokens' are known.", "unsupported_parameter")
    return bool(request.logprobs) if chat else request.logprobs is not None


def default_scorers(bon: BestOfN) -> dict[str, Scorer]:
    """Name the server's scorer, and offer the other ways to score with the same model.

    Scorers that are not from bon come alone.
    """
    scorer = bon.scorer
    engine = scorer.engine if isinstance(scorer, Flip | BackwardLikelihood) else None
    if engine is None:
        return {scorer.name: scorer}
    if isinstance(scorer, Flip):
        own = f"flip-{scorer.style.name}"
        return {own: scorer, "likelihood": BackwardLikelihood(engine)}
    return {"likelihood": scorer, "flip-direct": Flip(engine)}
