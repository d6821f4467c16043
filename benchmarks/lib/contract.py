"""Spot checks of what an engine promises, for a device on which nobody runs the tests.

Each check is told an engine and three short prompts and says whether the engine holds to its promise; the contract in
full is in `tests/test_engine_contract.py`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

from bon.engines.base import Completion, Keep, Prompt, Request
from bon.engines.torch.engine import TorchEngine
from bon.errors import PromptTooLongError
from bon.task import Message
from bon.types import Sampling

SEEDED = Sampling(max_tokens=16, seed=11)
LONG = 400  # tokens of a completion that is not waited for


async def collect(engine: TorchEngine, requests: Sequence[Request], keep: Keep | None = None) -> list[Completion]:
    """All completions, in the order of the requests and samples."""
    done = [completion async for completion in engine.generate(requests, keep=keep)]
    return sorted(done, key=lambda c: (c.request_index, c.sample_index))


async def divided(engine: TorchEngine, prompts: Sequence[Prompt]) -> bool:
    """A sample under a seed is the same however the samples are divided into requests and calls."""
    parts = [Request(prompts[0], SEEDED, 2), Request(prompts[0], SEEDED, 3, 2), Request(prompts[0], SEEDED, 1, 5)]
    whole = [c.text for c in await collect(engine, [Request(prompts[0], SEEDED, 6)])]
    in_one_call = [c.text for c in await collect(engine, parts)]
    in_calls = [c.text for part in parts for c in await collect(engine, [part])]
    return whole == in_one_call == in_calls and len(set(whole)) > 1


async def alone(engine: TorchEngine, prompts: Sequence[Prompt]) -> bool:
    """A sample under a seed does not depend on the rest of the call."""
    together = [c.text for c in await collect(engine, [Request(p, SEEDED, 2) for p in prompts])]
    return together == [c.text for p in prompts for c in await collect(engine, [Request(p, SEEDED, 2)])]


async def too_long(engine: TorchEngine, prompts: Sequence[Prompt]) -> bool:
    """A prompt that does not fit fails in its place, and the others run."""
    huge = Prompt.of([Message("user", "word " * (2 * (engine.max_model_len or 0)))])
    plain = [c.text for c in await collect(engine, [Request(p, SEEDED) for p in prompts[:2]])]
    first, failed, last = await collect(engine, [Request(p, SEEDED) for p in (prompts[0], huge, prompts[1])])
    return [first.text, last.text] == plain and isinstance(failed.error, PromptTooLongError)


async def closing(engine: TorchEngine, prompts: Sequence[Prompt]) -> bool:
    """Closing the generator aborts what is still running."""
    before = engine.stats.decoded
    requests = [Request(prompts[0], Sampling(max_tokens=4)), Request(prompts[1], Sampling(max_tokens=LONG))]
    async with aclosing(engine.generate(requests)) as stream:
        first = await anext(stream)
    await collect(engine, [Request(prompts[0], Sampling(max_tokens=1))])  # waits its turn behind what still runs
    return first.request_index == 0 and engine.stats.decoded - before < LONG // 2


async def keep(engine: TorchEngine, prompts: Sequence[Prompt]) -> bool:
    """Where ``keep`` says no the completion is aborted, and the others are what they were."""
    requests = [Request(p, SEEDED, 2) for p in prompts]
    plain = await collect(engine, requests)
    kept = await collect(engine, requests, lambda partial: partial.request_index != 1)
    return all(
        got.finish_reason == "abort" if got.request_index == 1 else got.text == expected.text
        for got, expected in zip(kept, plain, strict=True)
    )


async def likelihoods(engine: TorchEngine, prompts: Sequence[Prompt]) -> bool:
    """Log-likelihoods are finite and do not depend on the rest of the call; what does not fit fails in its place."""
    texts = ["a b c", "word " * (2 * (engine.max_model_len or 0)), "d"]
    first, failed, last = await engine.loglikelihood(prompts[:3], texts)
    single = await asyncio.gather(*(engine.loglikelihood([prompts[i]], [texts[i]]) for i in (0, 2)))
    return isinstance(failed.error, PromptTooLongError) and all(
        math.isfinite(got.total) and got.total < 0 and math.isclose(got.total, own.total, rel_tol=1e-3)
        for got, [own] in zip((first, last), single, strict=True)
    )


async def greedy(engine: TorchEngine, prompts: Sequence[Prompt]) -> bool:
    """At temperature 0 all samples are equal."""
    return len({c.text for c in await collect(engine, [Request(prompts[0], Sampling(0.0, max_tokens=16), 3)])}) == 1


CHECKS: dict[str, Callable[[TorchEngine, Sequence[Prompt]], Coroutine[Any, Any, bool]]] = {
    check.__name__: check for check in (divided, alone, too_long, closing, keep, likelihoods, greedy)
}
"""Name -> check."""
