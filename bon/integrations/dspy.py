"""A scorer as DSPy's reward function, and DSPy's ``BestOfN`` with all attempts at the same time.

from bon.integrations.dspy import BestOfN, reward

best = BestOfN(module=dspy.Predict("question -> answer"), N=8, reward_fn=reward("flip:Qwen/Qwen3-0.6B"), threshold=1.0)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from threading import Event
from typing import Any

from bon import portal
from bon.errors import InputError, MissingExtraError, number, whole_number
from bon.integrations.batches import Batches, reward_of
from bon.task import Task

try:
    import dspy
except ImportError as error:
    raise MissingExtraError("DSPy", "pip install 'bon[dspy]'") from error

log = logging.getLogger("bon")

DSPyReward = Callable[[Mapping[str, Any], Any], float]
Attempt = tuple[float, Any, list[Any]]
"""A reward, its prediction, and the trace that this left."""


def reward(scorer: Any, *, prompt: str | None = None, response: str | None = None) -> DSPyReward:
    """Return a reward function as DSPy calls it: with a module's inputs and its prediction.

    Predictions that are rated at the same time are scored in one batch; the scorer's models are loaded with the first.

    Args:
        scorer: as for ``bon.BestOfN``; one that rates each answer by itself.
        prompt: the input that holds what is asked; by default the only one, or all of them under their names.
        response: the output that is rated; by default the last one.

    Returns:
        A function that raises where the named fields are not there (``InputError``) or the answer has no reward, which
        DSPy counts as a failed attempt.
    """
    batches = Batches(scorer)

    def rate(args: Mapping[str, Any], pred: Any) -> float:
        task, text = Task.of(_asked(args, prompt)), _answered(pred, response)
        return reward_of(portal.run(batches.rate(task, text)), "The attempt has failed.")

    return rate


def _asked(args: Mapping[str, Any], name: str | None) -> str:
    if name is not None and name not in args:
        raise InputError(f"the module was called without the input {name!r} (prompt=). It got: {_listed(args)}.")
    if not args:
        raise InputError("the module was called without inputs: there is no prompt to rate an answer by.")
    named = {name: args[name]} if name is not None else args
    return str(next(iter(named.values()))) if len(named) == 1 else "\n".join(f"{n}: {v}" for n, v in named.items())


def _answered(pred: Any, name: str | None) -> str:
    fields = dict(pred.items()) if hasattr(pred, "items") else {}
    if not fields or (name is not None and name not in fields):
        what = "no outputs" if name is None else f"no output {name!r} (response=)"
        raise InputError(f"the prediction has {what}. It has: {_listed(fields)}.")
    value = fields[name if name is not None else [*fields][-1]]
    return "" if value is None else str(value)


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, fields)) or "nothing"


class BestOfN(dspy.Module):  # type: ignore[misc]
    """Run a module N times at once and return the best prediction.

    It is the one that ``dspy.BestOfN`` returns: the first in the order of the attempts whose reward reaches
    ``threshold``, else the one with the largest reward. It keeps nothing between calls, so one object serves many
    threads. DSPy's setting ``num_threads`` bounds the attempts that run together.

    Args:
        module: what is run; every attempt has a copy of its own, with a rollout id of its own and temperature 1.
        N: attempts at most.
        reward_fn: a function of the inputs and the prediction that returns a number; called on several threads.
        threshold: the reward that is good enough.
        fail_count: attempts that may fail, by an error of the module or of the reward, before that error is raised; by
            default all but one.

    Raises:
        InputError: an argument that cannot be.
    """

    def __init__(
        self,
        module: Any,
        N: int,  # noqa: N803 - DSPy's name
        reward_fn: Callable[[dict[str, Any], Any], float],
        threshold: float,
        fail_count: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(module, dspy.Module):
            raise InputError(
                f"module must be one of DSPy's, such as dspy.Predict('question -> answer'), not {module!r:.60}."
            )
        if not callable(reward_fn):
            raise InputError(f"reward_fn must be a function of (inputs, prediction), not {reward_fn!r:.60}.")
        self.module = module
        self.N = whole_number("N", N, 1)
        self.reward_fn: Callable[..., Any] = lambda *args: reward_fn(
            *args
        )  # a module in its place would become a parameter
        self.threshold = number("threshold", threshold)
        self.fail_count = N - 1 if fail_count is None else whole_number("fail_count", fail_count, 0)

    def forward(self, **kwargs: Any) -> Any:
        """Return the best prediction.

        Raises:
            InputError: no language model is configured, or a reward that is no number.
            Exception: that of an attempt, where more failed than may.
        """
        lm = self.module.get_lm() or dspy.settings.lm
        if lm is None:
            raise InputError("there is no language model: dspy.configure(lm=dspy.LM(...)).")
        start = lm.kwargs.get("rollout_id") or 0
        threads = ThreadPoolExecutor(min(self.N, dspy.settings.num_threads or self.N), "bon-dspy")
        models = [lm.copy(rollout_id=start + i, temperature=1.0) for i in range(self.N)]
        enough = Event()
        attempts = [threads.submit(copy_context().run, self._attempt, model, kwargs, enough) for model in models]
        try:
            pred, trace = self._best(attempts)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
        if trace and dspy.settings.trace is not None:
            dspy.settings.trace.extend(trace)
        return pred

    def _attempt(self, lm: Any, kwargs: dict[str, Any], enough: Event) -> Attempt:
        if enough.is_set():  # one before it was: nobody looks at this one
            return -math.inf, None, []
        module = self.module.deepcopy()
        module.set_lm(lm)
        with dspy.context(trace=[]):
            pred = module(**kwargs)
            trace = [*dspy.settings.trace]
            given = self.reward_fn(kwargs, pred)
        try:
            rated = number("the reward", float(given))
        except (TypeError, ValueError) as error:
            raise InputError(f"the reward of a prediction must be a number, got {given!r:.60}.") from error
        if rated >= self.threshold:
            enough.set()
        return rated, pred, trace

    def _best(self, attempts: list[Future[Attempt]]) -> tuple[Any, list[Any]]:
        best: Attempt | None = None
        failed = 0
        for i, attempt in enumerate(attempts):
            try:
                made = attempt.result()
            except Exception as error:
                failed += 1
                log.warning("attempt %d of %d failed: %s: %s", i + 1, self.N, type(error).__name__, error)
                if failed > self.fail_count or failed == self.N:
                    raise
                continue
            if best is None or made[0] > best[0]:
                best = made
            if made[0] >= self.threshold:
                break
        assert best is not None
        return best[1:]
