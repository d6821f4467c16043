"""``bon bench``: latency, pruning and prefix sharing on a user's own models, in one report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bon import portal
from bon.bench.harness import Report, conditions, forget, shape_of
from bon.bench.latency import latency_table, measure_latency
from bon.bench.pruning import PRUNED, STOPPED, measure_pruning
from bon.engines.base import Engine, Generates, Prompt, Rates
from bon.errors import BonError
from bon.scorers.base import Scorer
from bon.scorers.flip import Flip
from bon.scorers.likelihood import BackwardLikelihood
from bon.task import Message, Task
from bon.types import Sampling

FLIP, LIKELIHOOD = "FLIP direct", "likelihood"


def bench(
    policy: Generates,
    reader: Generates,
    tasks: Sequence[Task],
    *,
    n: int = 16,
    max_tokens: int = 96,
    seed: int = 0,
    quick: bool = False,
) -> Report:
    """Measure best-of-n with FLIP (``direct``) and, where its engine gives log-probabilities, the likelihood scorer.

    Args:
        policy: what samples.
        reader: the engine that FLIP runs on; may be the policy.
        tasks: what is asked; quick takes the first three.
        n: candidates; latency is measured for powers of two up to it as well, unless quick.
        max_tokens: of a response and of a reconstruction.
        seed: of the sampling.
        quick: few rounds and sizes.
    """
    from bon.engines.torch.engine import TorchEngine

    tasks = tasks[:3] if quick else tasks
    sampling = Sampling(max_tokens=max_tokens, seed=seed)
    judge = Flip(reader, sampling=Sampling(temperature=0.0, max_tokens=max_tokens))
    scorers: dict[str, Scorer] = {FLIP: judge}
    if _rates(reader):
        scorers[LIKELIHOOD] = BackwardLikelihood(reader)
    report = Report("bench", conditions(policy=policy.name, scorer=reader.name, tasks=len(tasks), n=n, seed=seed))
    report.conditions["max_tokens"] = max_tokens

    def fresh() -> None:
        forget(policy, reader)

    latencies = measure_latency(policy, scorers, tasks, _numbers(n, quick), sampling, before=fresh)
    report.text.append(latency_table(latencies))
    for latency in latencies:
        report.rows += latency.rows()
    for name in scorers:
        report.ratios["overhead_likelihood" if name == LIKELIHOOD else "overhead"] = latencies[-1].overhead(name)

    exact = isinstance(reader, TorchEngine) and reader._model.dtype.itemsize == 4
    pruning = measure_pruning(policy, judge, tasks, n, sampling, exact=exact, before=fresh)
    report.text.append(pruning.text())
    report.rows += pruning.rows()
    report.ratios["pruning_saved"], report.ratios["stopping_saved"] = pruning.saved(PRUNED), pruning.saved(STOPPED)

    if isinstance(policy, TorchEngine):
        _sharing(report, policy._model, n, seed, quick)
    return report


def _sharing(report: Report, model: Any, n: int, seed: int, quick: bool) -> None:
    """Bare forward passes of the policy with n rows."""
    from bon.bench.forward import forward_table, measure_forward
    from bon.engines.torch.prefix.attention import NAME

    report.conditions["policy_shape"] = shape_of(model.config)
    if model.config._attn_implementation != NAME:  # what the engine chose when it ran a moment ago
        report.text.append("Prefixes are not shared with this model: it runs as transformers runs it.")
        return
    sizes = {"rows": n, "rounds": 1 if quick else 3, "seed": seed, "exact": model.dtype.itemsize == 4}
    measured = [measure_forward(model, prefix=prefix, **sizes) for prefix in ((128,) if quick else (128, 512))]
    report.text.append(forward_table(measured))
    report.rows += [pairs.to_dict() for cases in measured for pairs in cases.values()]
    for case in ("prefill", "decode"):
        report.ratios[f"{case}_shared"] = measured[-1][case].ratio


def _numbers(n: int, quick: bool) -> list[int]:
    return [n] if quick else [*(2**power for power in range(n.bit_length()) if 2**power < n), n]


def _rates(engine: Engine) -> bool:
    """Whether an engine gives log-probabilities of a text; what stands behind a URL shows when it is asked."""
    if not isinstance(engine, Rates):
        return False
    try:
        [rated] = portal.run(engine.loglikelihood([Prompt.of([Message("user", "a")])], ["b"]))
    except BonError:
        return False
    return rated.error is None
