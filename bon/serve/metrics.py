"""Prometheus metrics of one server; ``dashboard.json`` is a Grafana dashboard of them."""

from __future__ import annotations

import itertools
import re
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from bon.serve.admission import Admission
from bon.serve.failures import ClientGone, api_error
from bon.serve.plan import Plan, Work
from bon.types import Result

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_REWARDS = tuple(i / 20 for i in range(21))
_NUMBER = re.compile(r"-?\d[\d.e+-]*")  # in a reason: labels stay few
STAGES = ("queue", "sample", "score", "select", "total")
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/score", "/v1/rerank")


class Metrics:
    """Counts what the server does, in a registry of its own.

    Args:
        admission: whose queue is shown.
    """

    def __init__(self, admission: Admission) -> None:
        self.registry = registry = CollectorRegistry()

        counter = partial(Counter, namespace="bon", registry=registry)
        gauge = partial(Gauge, namespace="bon", registry=registry)
        seconds = partial(Histogram, namespace="bon", registry=registry, buckets=_SECONDS)
        rewards = partial(Histogram, namespace="bon", registry=registry, buckets=_REWARDS)
        self.http = counter("http_requests", "HTTP requests", ("path", "status"))
        self.first_byte = seconds("time_to_first_byte_seconds", "From a request to its first byte")
        self.runs = counter("runs", "Best-of-N runs by how they ended", ("outcome",))
        self.candidates = counter("candidates", "Candidates by finish reason", ("finish_reason",))
        self.scores = counter("scores", "Scores by status, the parse statuses among them", ("status",))
        self.stopped = counter("stopped_early_runs", "Runs that a good enough candidate ended early")
        self.stops = counter("budget_stops", "Runs whose budget asked for no more, by its reason", ("reason",))
        self.unasked = counter("samples_saved", "Samples that such runs might have had and did not ask for")
        self.stage = seconds("stage_seconds", "Latency by stage; sampling and scoring overlap", ("stage",))
        self.overlap = counter("overlap_seconds", "Seconds in which sampling and scoring overlapped")
        self.tokens = counter("tokens", "Tokens", ("model", "kind"))
        self.cached = counter("cached_prompt_tokens", "Prompt tokens that a shared prefix saved")
        self.cache_hits = counter("prefix_cache_hit_runs", "Runs in which a prefix was shared")
        self.reward = rewards("winner_reward", "Reward of the winner")
        self.mean_reward = rewards("mean_reward", "Mean reward of a run's candidates")
        self.ready = gauge("ready", "1 when the models answer and the server is not shutting down")
        gauge("running_requests", "Requests that run").set_function(lambda: admission.running)
        gauge("waiting_requests", "Requests that wait for their turn").set_function(lambda: admission.waiting)
        for path in PATHS:  # so that rates start at 0 and not at the first event
            self.http.labels(path, "200")
        for outcome in ("ok", "deadline", "client_gone"):
            self.runs.labels(outcome)
        for stage in STAGES:
            self.stage.labels(stage)

    def ended(self, plan: Work, outcome: Result | BaseException, queue_s: float) -> None:
        """Count a run."""
        self.stage.labels("queue").observe(queue_s)
        if not isinstance(outcome, Result):
            gone = isinstance(outcome, ClientGone)
            self.runs.labels("client_gone" if gone else api_error(outcome, plan.passed).code).inc()
            return
        late = "late" in outcome.counts
        self.runs.labels("deadline" if late else "ok").inc()
        sampled = isinstance(plan, Plan)
        for candidate in outcome.candidates if sampled else ():
            self.candidates.labels(candidate.finish_reason).inc()
        for status, count in outcome.counts.items():
            self.scores.labels(status).inc(count)
        best, stop_at = outcome.reward, getattr(plan.bon.budget, "stop_at", None) if isinstance(plan, Plan) else None
        if stop_at is not None and best is not None and best >= stop_at and "pruned" in outcome.counts:
            self.stopped.inc()
        if outcome.stop is not None and isinstance(plan, Plan):
            self.stops.labels(_NUMBER.sub("N", outcome.stop.reason)).inc()
            asked = len(outcome.candidates)
            self.unasked.inc(getattr(plan.bon.budget, "most", asked) - asked)
        timing, usage = outcome.timing, outcome.usage
        for stage in ("sample", "score", "select") if sampled else ("score", "select"):
            self.stage.labels(stage).observe(getattr(timing, stage))
        self.stage.labels("total").observe(queue_s + timing.total)
        self.overlap.inc(timing.overlap)
        for model, kind in itertools.product(("policy", "scorer"), ("prompt", "completion")):
            self.tokens.labels(model, kind).inc(getattr(usage, f"{model}_{kind}_tokens"))
        if usage.cached_tokens:
            self.cached.inc(usage.cached_tokens)
            self.cache_hits.inc()
        rewards = [score.reward for score in outcome.scores if score.reward is not None]
        if best is not None:
            self.reward.observe(best)
            self.mean_reward.observe(sum(rewards) / len(rewards))

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
