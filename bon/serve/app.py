"""The application: OpenAI's endpoints, answered by best-of-N."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from bon import __version__
from bon.best_of_n import BestOfN
from bon.engines.base import Engine
from bon.mini.tasks import FAMILIES, instruction, sample_tasks
from bon.models import MINI
from bon.scorers.base import Scorer
from bon.serve.admission import Admission
from bon.serve.answers import Answer, joined, usage_body
from bon.serve.bodies import Bodies
from bon.serve.edge import Edge
from bon.serve.failures import ApiError, ClientGone, api_error, json_response
from bon.serve.health import Health
from bon.serve.job import Job, W, while_connected
from bon.serve.metrics import Metrics
from bon.serve.plan import Planner, Work, further_scorers, offered_scorers
from bon.serve.playground import PAGE, POLICY
from bon.serve.protocol import ChatRequest, CompletionRequest, parse
from bon.serve.responses import (
    ChatResponse,
    CompletionResponse,
    ErrorResponse,
    ModelBody,
    ModelList,
    RerankResponse,
    ScoreResponse,
    StateBody,
)
from bon.serve.scoring import RerankRequest, ScoreRequest, Scoring
from bon.serve.settings import Settings
from bon.serve.stream import EventStream
from bon.types import Result, Usage

log = logging.getLogger("bon.serve")

# A request that fails within this time gets its own HTTP status although it asked for a stream.
STREAM_OPENS_AFTER_S = 0.05


class Server:
    """What the routes share, and the routes.

    Args:
        bon: models and defaults.
        settings: limits and names.
    """

    def __init__(self, bon: BestOfN, settings: Settings) -> None:
        self.bon, self.settings = bon, settings
        scorers = offered_scorers(bon)
        scorers |= further_scorers(bon, next(iter(scorers)), settings.scorers)
        self.admission = Admission(settings.max_running or _at_once(bon.policy, scorers.values()), settings.max_waiting)
        self.bodies = Bodies(settings)
        self.metrics = Metrics(self.admission)
        self.health = Health(bon, self.admission)
        self.planner = Planner(bon, scorers, settings)
        self.started = int(time.time())
        self._jobs: set[Job[Any]] = set()

    async def chat_completions(self, request: Request) -> Response:
        """Sample candidates, score them, return the best."""
        return await self._complete(ChatRequest, request)

    async def completions(self, request: Request) -> Response:
        """Do the same for a bare prompt, taken as a user's message."""
        return await self._complete(CompletionRequest, request)

    async def _complete(self, kind: type[ChatRequest] | type[CompletionRequest], request: Request) -> Response:
        asked = parse(kind, await self.bodies.read(request))
        async with self._started(request, map(self.planner.plan, asked.each)) as jobs:
            if asked.stream:
                [job] = jobs
                await asyncio.wait([job.task], timeout=STREAM_OPENS_AFTER_S)
                if not job.task.done() or job.task.exception() is None:
                    return EventStream(job, self.settings.heartbeat_s, self.settings.status_s)
            results = [await while_connected(request, asyncio.shield(job.task)) for job in jobs]
            wholes = [Answer(j.plan).whole(r, j.ticket.queue_s) for j, r in zip(jobs, results, strict=True)]
            return json_response(joined(wholes, results))

    async def score(self, request: Request) -> Response:
        """Score texts as answers to a prompt, or to many."""
        return await self._score(ScoreRequest, request)

    async def rerank(self, request: Request) -> Response:
        """Rank documents by how well they answer a query."""
        return await self._score(RerankRequest, request)

    async def _score(self, kind: type[ScoreRequest] | type[RerankRequest], request: Request) -> Response:
        asked = parse(kind, await self.bodies.read(request))
        async with self._started(request, [Scoring.of(self.planner, asked)]) as [job]:
            outcomes = await while_connected(request, asyncio.shield(job.task))
            return json_response(job.plan.answer(outcomes, job.ticket.queue_s))

    @asynccontextmanager
    async def _started(self, request: Request, works: Iterable[W]) -> AsyncIterator[list[Job[W]]]:
        """The jobs of a request; what goes wrong with one of them, or with its answer, stops them all.

        Raises:
            ApiError: what the client is told.
        """
        jobs = list[Job[W]]()
        try:
            for work in works:
                jobs.append(Job(work, self.admission.ticket(), partial(self._ended, work, request)))
                self._jobs.add(jobs[-1])
            yield jobs
        except BaseException as error:
            for job in jobs:
                await job.abort()
            if isinstance(error, ApiError) or not isinstance(error, Exception):
                raise
            raise api_error(error, jobs[-1].plan.passed if jobs else None) from error

    def stop(self) -> None:
        """Stop all work; clients are told that the server shuts down."""
        for job in self._jobs:
            job.stop(ApiError(503, "the server is shutting down.", "draining"))

    def _ended(self, work: Work, request: Request, job: Job[Any], ended: Any) -> None:
        self._jobs.discard(job)
        outcomes: list[Result | BaseException] = ended if isinstance(ended, list) else [ended]
        fields: dict[str, Any] = request.state.log
        fields |= {"n": work.n, "scorer": work.scorer, "queue_ms": round(job.ticket.queue_s * 1000, 2)}
        for outcome in outcomes:
            self.health.saw(outcome)
            self.metrics.ended(work, outcome, job.ticket.queue_s)
            if isinstance(outcome, ClientGone):
                fields["client_gone"] = True
            elif isinstance(outcome, Exception):
                fields["error"] = type(outcome).__name__
                failure = api_error(outcome, work.passed)
                if failure.status >= 500 and failure.code not in ("deadline_exceeded", "draining"):
                    log.error("run failed", exc_info=outcome, extra={"fields": {"event": "error"}})
        results = [outcome for outcome in outcomes if isinstance(outcome, Result)]
        only = results[0] if results and len(outcomes) == 1 else None  # the log has no line for each of many
        if results:
            spent = sum((result.usage for result in results), Usage())
            usage = usage_body(spent)
            statuses = sum((Counter(result.counts) for result in results), Counter[str]())
            fields |= {"statuses": dict(statuses), "reward": only.reward if only else None}
            fields |= {f"{model}_tokens": sum(usage[model].values()) for model in ("policy", "scorer")}
            fields["cached_tokens"] = spent.cached_tokens
        if self.settings.log_prompts:
            fields["prompt"] = [message.to_dict() for task in work.tasks for message in task.messages]
            fields["answer"] = only.text if only else None

    async def models(self) -> Response:
        """List the names that ``model`` may have."""
        return json_response({"object": "list", "data": [self._model(name) for name in self.planner.models]})

    async def model(self, name: str) -> Response:
        """Describe one of them."""
        self.planner.check_model(name)
        return json_response(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        names = list(self.planner.scorers)
        about: dict[str, Any] = {"n": self.bon.n, "max_n": self.planner.max_n, "scorers": names, "scorer": names[0]}
        if self.bon.policy.name == MINI:
            about["kinds"] = {task.family: instruction(task) for task in sample_tasks(len(FAMILIES))}
        return {"id": name, "object": "model", "created": self.started, "owned_by": "bon", "best_of_n": about}

    async def alive(self) -> Response:
        """Report that the process answers."""
        return json_response({"status": "ok"})

    async def ready(self) -> Response:
        """Report whether a request sent now would be answered."""
        if self.admission.draining:
            return json_response({"status": "draining", "reason": "the server is shutting down"}, 503)
        if self.health.reason is not None:
            return json_response({"status": "failed", "reason": "a model does not answer"}, 503)
        return json_response({"status": "ready"})

    async def scrape(self) -> Response:
        """Expose the Prometheus metrics."""
        self.metrics.ready.set(self.health.reason is None and not self.admission.draining)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self) -> Response:
        """Show the playground."""
        return Response(PAGE, media_type="text/html; charset=utf-8", headers={"content-security-policy": POLICY})


def create_app(bon: BestOfN, settings: Settings | None = None) -> FastAPI:
    """Build the application; ``app.state.server`` is its ``Server``.

    When it shuts down it closes ``bon``, which frees the models that ``bon`` loaded and no engine that was passed in.

    Args:
        bon: models and defaults.
        settings: limits and names.
    """
    settings = settings or Settings()
    server = Server(bon, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await server.health.start()
        yield
        await server.health.aclose()
        await bon.aclose()

    app = _App(title="bon", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.server = server
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": what} for status, what in _ERRORS.items()
    }
    streamed: dict[str, Any] = {"content": {"text/event-stream": {}}}
    for path, answer, takes, gives in (
        ("/v1/chat/completions", server.chat_completions, ChatRequest, streamed | {"model": ChatResponse}),
        ("/v1/completions", server.completions, CompletionRequest, streamed | {"model": CompletionResponse}),
        ("/v1/score", server.score, ScoreRequest, {"model": ScoreResponse}),
        ("/v1/rerank", server.rerank, RerankRequest, {"model": RerankResponse}),
    ):
        body = {"content": {"application/json": {"schema": {"$ref": _SCHEMAS.format(model=takes.__name__)}}}}
        responses = errors | {200: gives}
        app.post(path, responses=responses, openapi_extra={"requestBody": {"required": True, **body}})(answer)
    app.get("/v1/models", responses={200: {"model": ModelList}, 401: errors[401]})(server.models)
    about_one = {200: {"model": ModelBody}} | {status: errors[status] for status in (401, 404)}
    app.get("/v1/models/{name:path}", responses=about_one)(server.model)
    app.get("/health", responses={200: {"model": StateBody}})(server.alive)
    unready = {"model": StateBody, "description": "Not now"}
    app.get("/ready", responses={200: {"model": StateBody}, 503: unready})(server.ready)
    app.get("/metrics", include_in_schema=False)(server.scrape)
    if settings.shows_playground:
        app.get("/", include_in_schema=False)(server.page)
    app.add_exception_handler(ApiError, _answer)
    app.add_exception_handler(HTTPException, _answer)
    paths = frozenset(getattr(route, "path", "") for route in app.routes)
    app.add_middleware(Edge, settings=settings, metrics=server.metrics, paths=paths)
    if settings.cors_origins:  # outermost: a preflight carries no key, and a page may read what an error says
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


_ERRORS = {
    400: "A field is wrong",
    401: "No valid API key",
    403: "The host name is not answered to",
    404: "No such model",
    408: "The request did not arrive in time, or its deadline passed before there was a candidate",
    413: "The request is too large",
    415: "Not JSON",
    429: "The queue is full",
    500: "A fault of the server",
    502: "The server behind this one refuses the request",
    503: "A model does not answer, or the server shuts down",
}
_SCHEMAS = "#/components/schemas/{model}"


def _at_once(policy: Engine, scorers: Iterable[Scorer]) -> int:
    """Requests that run at the same time; see ``Settings.max_running``."""
    scorers = list(scorers)
    if policy.concurrent and all(scorer.concurrent for scorer in scorers):
        return 64
    engines = [policy, *(engine for scorer in scorers for engine in scorer.engines)]
    taken = all(scorer.concurrent or scorer.engines for scorer in scorers)
    return 8 if taken and all(each.concurrent or getattr(each, "queues", False) for each in engines) else 1


def _answer(request: Request, error: Exception) -> Response:
    """Put an error into OpenAI's shape, and its code, which holds no text of the client's, into the log."""
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http")
        error = ApiError(error.status_code, f"{error.detail}.", code, headers=error.headers)
    answer = api_error(error)
    request.state.log["code"] = answer.code
    return answer.response()


class _App(FastAPI):
    """Describes the requests as well: the routes read their bodies themselves, so FastAPI does not know them."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        if self.openapi_schema is None:
            kinds = (ChatRequest, CompletionRequest, ScoreRequest, RerankRequest)
            wanted = [(kind, "validation") for kind in kinds]
            _, schemas = models_json_schema(wanted, ref_template=_SCHEMAS)  # type: ignore[arg-type]
            super().openapi()["components"]["schemas"].update(schemas["$defs"])
        return super().openapi()
