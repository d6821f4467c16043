"""What is worth knowing about the torch engine on a CUDA card, found out within a few minutes.

Random models in the shapes of Qwen3-0.6B and Qwen3-4B are made on the spot, nothing is downloaded. Six parts:

- contract: what an engine promises, spot-checked in float32 (`contract`, the share of checks that held; 1);
- greedy: the share of tokens, up to the first difference, that are those of transformers' `generate`; beside it the
  share of `generate` with itself in a padded batch, which is what rounding alone does (`greedy_float32`, 1);
- sharing: prefill, decode step and peak memory of rows with a common prefix, plain transformers / bon;
- sampling: 16 samples of a prompt, transformers' `generate` / bon;
- best_of: best-of-16 with FLIP / sampling 16 alone, a 4B policy and a 0.6B scorer (`overhead_bon16`);
- budget: peak memory of a full batch / what `max_batch_tokens` says it holds (`peak_of_budget_...`, 1 plus what the
  layers and the logits need).

No part can make the script exceed `--minutes`: each has a share of the time that is left and starts no step for which
there is none, and at the limit the script prints what it has and ends. With `--quick`, or without CUDA, tiny models
show in seconds that it runs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bon import portal
from bon.bench.forward import (
    PLAIN,
    SHARED,
    DifferentTokensError,
    forward_table,
    measure_forward,
    plain_forward,
    shared_forward,
)
from bon.bench.harness import Pairs, Spread, interleave, milliseconds, table
from bon.bench.latency import Latency, latency_table, measure_latency
from bon.engines.base import Completion, Prompt, Request
from bon.engines.loading import load
from bon.engines.memory import kv_bytes_per_token
from bon.engines.torch.engine import TorchEngine
from bon.engines.torch.prefix.attention import NAME
from bon.errors import BonError
from bon.scorers.flip import Flip
from bon.task import Message, Task
from bon.types import Sampling
from lib.card import POLICY, SCORER, Bench, Parts
from lib.contract import CHECKS, collect
from lib.scripts import parser, script

SIZES = ((512, 16), (2048, 32), (512, 64), (4096, 32))  # of the forward passes: prefix, rows
INSTRUCTION = 24  # tokens
OVER = 3  # exit status


def contract(bench: Bench) -> None:
    """Check what an engine promises."""
    engine = bench.engine(SCORER, dtype="float32")
    prompts = [_prompt(bench.filler(tokens)) for tokens in (20, 40, 60)]
    broken = []
    for name, check in CHECKS.items():
        said = {}
        try:
            held = portal.run(check(engine, prompts))
        except BonError as error:
            held, said = False, {"error": str(error)}
        bench.report.rows.append({"case": "contract", "check": name, "held": held, **said})
        broken += [] if held else [name]
    bench.report.ratios["contract"] = Spread.of([1 - len(broken) / len(CHECKS)])
    if broken:
        raise BonError(f"the engine does not hold to {', '.join(broken)}.")


def greedy(bench: Bench) -> None:
    """Compare greedy completions with those of transformers' ``generate``."""
    history = bench.filler(200)
    prompts = [_prompt(history + bench.filler(10 + 7 * i)) for i in range(8)]
    tokens = 8 if bench.small else 48
    lines = []
    for dtype in bench.clock.within(("float32", "bfloat16")):
        engine = bench.engine(SCORER, dtype=dtype)
        asked = [Request(p, Sampling(temperature=0, max_tokens=tokens)) for p in prompts]
        made = [list(c.tokens.ids) if c.tokens else [] for c in _sample(engine, asked)]
        ids = [list(engine.renderer.render(p)) for p in prompts]
        plain, _ = load(bench.model(SCORER), device=bench.device, dtype=dtype)
        expected = [row for prompt in ids for row in _generate(plain, [prompt], tokens)]
        agree, floor = _agreement(made, expected), _agreement(_generate(plain, ids, tokens), expected)
        del plain
        row = {"case": "greedy", "dtype": dtype, "tokens": tokens * len(ids), "agree": agree, "padded_agree": floor}
        bench.report.rows.append(row)
        bench.report.ratios[f"greedy_{dtype}"] = Spread.of([agree])
        lines.append([dtype, f"{agree:.3f}", f"{floor:.3f}"])
        if dtype == "float32" and agree < floor:
            raise DifferentTokensError(f"{agree:.3f} of the tokens are those of transformers' generate in float32.")
    headers = ["share of generate's tokens", "bon", "generate, padded"]
    bench.report.text.append(table(headers, lines))


def _generate(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    made = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    rows: list[list[int]] = made[:, width:].tolist()
    return rows


def _agreement(made: list[list[int]], expected: list[list[int]]) -> float:
    """Share of the expected tokens before the first that is different."""
    same = 0
    for got, wanted in zip(made, expected, strict=True):
        different = [i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b]
        same += min([*different, len(got), len(wanted)])
    return same / sum(map(len, expected))


def sharing(bench: Bench) -> None:
    """Compare bare forward passes of rows with a common prefix, and what they take of memory."""
    model = bench.engine(POLICY)._model
    exact, steps = bench.options.dtype == "float32", 2 if bench.small else 16
    measured = []
    for prefix, rows in bench.clock.within(((16, 4),) if bench.small else SIZES):
        try:
            cases = measure_forward(model, prefix=prefix, rows=rows, steps=steps, rounds=bench.rounds, exact=exact)
            cases |= _peaks(bench, model, prefix, rows, steps)
        except torch.OutOfMemoryError:
            bench.report.rows.append({"case": "sharing", "prefix": prefix, "rows": rows, "outcome": "out of memory"})
            continue
        measured.append(cases)
        for name, pairs in cases.items():
            bench.report.rows.append(pairs.to_dict())
            bench.report.ratios[f"{name}_shared_{prefix}x{rows}"] = pairs.ratio
    bench.report.text.append(forward_table(measured))


def _peaks(bench: Bench, model: Any, prefix: int, rows: int, steps: int) -> dict[str, Pairs]:
    common = torch.randint(3, min(1000, model.config.vocab_size), (prefix,)).tolist()
    prompts = [(*common, 3 + row, 4) for row in range(rows)]
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("sdpa")
        plain = bench.peak(lambda: plain_forward(model, prompts, steps))
        model.set_attn_implementation(NAME)
        shared = bench.peak(lambda: shared_forward(model, prompts, steps))
    finally:
        model.set_attn_implementation(before)
    if plain is None or shared is None:
        return {}
    return {"peak": Pairs("peak", {"prefix": prefix, "rows": rows}, (PLAIN, SHARED), [plain], [shared], "B")}


def sampling(bench: Bench) -> None:
    """Compare sampling 16 completions of one prompt, end to end, with transformers' ``generate``."""
    engine = bench.engine(POLICY)
    length, tokens, n = (50, 4, 4) if bench.small else (1000, 64, 16)
    prompt = _prompt(bench.filler(length))
    ids = torch.tensor([engine.renderer.render(prompt)], device=bench.device)
    plain, _ = load(bench.model(POLICY), device=bench.device, dtype=bench.options.dtype)
    drawn = {"do_sample": True, "top_k": 0, "num_return_sequences": n, "max_new_tokens": tokens, "pad_token_id": 0}
    sides: dict[str, Callable[[int], object]] = {
        "generate": lambda round_: plain.generate(ids, attention_mask=torch.ones_like(ids), **drawn).cpu(),
        "bon": lambda round_: _sample(engine, [Request(prompt, Sampling(max_tokens=tokens, seed=round_ + 1), n)]),
    }
    timed = interleave(sides, bench.rounds)
    generate, bon = ([t.seconds for t in timed[side]] for side in sides)
    pairs = Pairs("sampling", {"prompt": ids.shape[1], "n": n, "tokens": tokens}, ("generate", "bon"), generate, bon)
    bench.report.rows.append(pairs.to_dict())
    bench.report.ratios["sampling"] = pairs.ratio
    lines = [[f"{n} of {tokens} tokens, prompt {ids.shape[1]}", *map(milliseconds, pairs.to_dict()["medians"])]]
    bench.report.text.append(table(["milliseconds", "generate", "bon"], lines))


def best_of(bench: Bench) -> None:
    """Time best-of-16 with FLIP beside sampling 16 alone."""
    policy, scorer = bench.engine(POLICY), bench.engine(SCORER)
    flip = Flip(scorer, sampling=Sampling(temperature=0, max_tokens=4 if bench.small else INSTRUCTION), draft=False)
    sampling = Sampling(max_tokens=8 if bench.small else 256, seed=bench.options.seed)
    tasks = [Task.of(bench.filler(INSTRUCTION).strip()) for _ in range(1 if bench.small else 5)]
    done: list[Latency] = []
    for task in bench.clock.within(tasks):
        done += measure_latency(policy, {"flip": flip}, [task], [16], sampling)
    every = Latency(
        16,
        [seconds for latency in done for seconds in latency.alone],
        {"flip": [seconds for latency in done for seconds in latency.total["flip"]]},
        {"flip": [result for latency in done for result in latency.results["flip"]]},
    )
    bench.report.rows += every.rows()
    bench.report.ratios["overhead_bon16"] = every.overhead("flip")
    bench.report.text.append(f"4B policy, 0.6B scorer\n{latency_table([every])}")


def budget(bench: Bench) -> None:
    """Fill a batch and a half and look what it takes."""
    limit: dict[str, Any] = {"max_batch_tokens": 2048} if bench.small else {}
    cases = {
        "4b_shared": (POLICY, {}),
        "0.6b_shared": (SCORER, {}),
        "0.6b_plain": (SCORER, {"share_prefix": False}),
    }
    each = 200 if bench.small else 2000
    lines = []
    for name, (shape, options) in bench.clock.within(cases.items()):
        engine = bench.engine(shape, **limit, **options)
        config = engine._model.config.get_text_config(decoder=True)
        stated = engine.max_batch_tokens * kv_bytes_per_token(config, engine._model.dtype.itemsize)
        prompts = [_prompt(bench.filler(each)) for _ in range(3 * engine.max_batch_tokens // (2 * each))]
        _sample(engine, [Request(prompts[0], Sampling(max_tokens=2))])  # with what is done once
        asked = [Request(p, Sampling(max_tokens=8), 2) for p in prompts]
        peak = bench.peak(partial(_sample, engine, asked))
        facts = {"max_batch_tokens": engine.max_batch_tokens, "stated_bytes": stated, "peak_bytes": peak}
        bench.report.rows.append({"case": "budget", "engine": name, **facts})
        if peak is not None:
            bench.report.ratios[f"peak_of_budget_{name}"] = Spread.of([peak / stated])
        lines.append([name, *facts.values()])
    bench.report.text.append(table(["a batch", "tokens", "bytes stated", "bytes at most"], lines))


PARTS: Parts = {
    "contract": (0.1, contract),
    "greedy": (0.15, greedy),
    "sharing": (0.35, sharing),  # makes the large model
    "sampling": (0.1, sampling),
    "best_of": (0.3, best_of),
    "budget": (0.1, budget),
}


def _sample(engine: TorchEngine, requests: Sequence[Request]) -> list[Completion]:
    return portal.run(collect(engine, requests))


def _prompt(text: str) -> Prompt:
    return Prompt.of([Message("user", text.strip())])


def main(argv: list[str] | None = None) -> None:
    options = _options(argv)
    folder = Path(tempfile.mkdtemp(prefix="bon-gpu-"))
    bench = Bench(options, folder, PARTS)

    def over() -> None:
        try:
            bench.report.text.append(f"Ended after {options.minutes:g} minutes: what is missing was not reached.")
            bench.report.emit(options.out)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os._exit(OVER)  # whatever the card is doing

    limit = threading.Timer(60 * options.minutes, over)
    limit.daemon = True
    limit.start()
    try:
        bench.run()
    finally:
        limit.cancel()
        shutil.rmtree(folder, ignore_errors=True)
    bench.report.emit(options.out)
    portal.run(bench.pool.aclose())
    if bench.failed:
        sys.exit("error: " + "; ".join(bench.failed))


def _options(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__ or "")
    options.set_defaults(dtype="bfloat16")
    options.add_argument("--minutes", type=float, default=8.0, help="that the script may take, all in all")
    return options.parse_args(argv)


if __name__ == "__main__":
    script(main)
