"""Throughput over a file of prompts, against the plain loop that a user would write with transformers.

Claims: 200 prompts with n=8 go through bon at least five times as fast as through `generate(num_return_sequences=8)`
and a loop that scores one candidate after the other, prompt by prompt (`end_to_end`). A more careful loop, which scores
a prompt's 8 candidates in one padded batch, is measured beside it (`end_to_end_batched`). All sides use the same model,
prompts, sampling, scoring prompt and reward.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bon import BestOfN
from bon.bench.harness import Pairs, Report, Spread, conditions, interleave, parser, table
from bon.bench.models import describe, open_engine
from bon.engines.loading import load
from bon.mini import WEIGHTS
from bon.mini.tasks import sample_instructions
from bon.prompts import load_style
from bon.scorers import Flip
from bon.similarity import WordF1
from bon.types import Sampling, Task

BON, PLAIN, BATCHED = "bon", "plain loop", "plain loop, batched scoring"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one side made of the prompts: mean reward of the winners, and tokens that were decoded."""

    reward: float
    tokens: int


def main(argv: list[str] | None = None) -> None:
    options = _options(argv)
    count, rounds = options.prompts or (12 if options.quick else 200), 1 if options.quick else 3
    prompts = sample_instructions(count, options.seed)
    sampling = Sampling(max_tokens=options.max_tokens, seed=options.seed)
    engine = open_engine(options.policy, options)
    bon = BestOfN(
        engine,
        Flip(engine, sampling=Sampling(temperature=0.0, max_tokens=options.max_tokens)),
        n=options.n,
        sampling=sampling,
    )
    loop = PlainLoop(options.policy or WEIGHTS, options)
    card = conditions(seed=options.seed, dtype=options.dtype, engine=options.engine, model=describe(options.policy))
    sides: dict[str, Callable[[int], Outcome]] = {
        PLAIN: lambda round_: loop(_some(prompts, round_), batched=False),
        BATCHED: lambda round_: loop(_some(prompts, round_), batched=True),
        BON: lambda round_: _with_bon(bon, _some(prompts, round_)),
    }
    torch.manual_seed(options.seed)
    timed = interleave(sides, rounds, label="throughput")
    report = Report("throughput", {**card, "prompts": count, "n": options.n, "max_tokens": options.max_tokens})
    seconds = {name: [t.seconds for t in ts] for name, ts in timed.items()}
    for key, side in (("end_to_end", PLAIN), ("end_to_end_batched", BATCHED)):
        pairs = Pairs(key, {"prompts": count, "n": options.n}, (side, BON), seconds[side], seconds[BON])
        report.ratios[key] = pairs.ratio
        report.rows.append(pairs.to_dict())
    lines = []
    for name, of_side in timed.items():
        row = {
            "case": "side",
            "side": name,
            "seconds": Spread.of(seconds[name]).median,
            "prompts_per_s": Spread.of([count / t.seconds for t in of_side]).median,
            "tokens_per_s": Spread.of([t.value.tokens / t.seconds for t in of_side]).median,
            "mean_best_reward": float(np.mean([t.value.reward for t in of_side])),
        }
        report.rows.append(row)
        figures = [
            f"{row[k]:.{d}f}"
            for k, d in (("seconds", 1), ("prompts_per_s", 1), ("tokens_per_s", 0), ("mean_best_reward", 3))
        ]
        lines.append([name, *figures])
    report.text.append(table(["side", "seconds", "prompts/s", "tokens/s", "mean best reward"], lines))
    report.text += [f"{key}: {spread:.2f} times as fast (quartiles)" for key, spread in report.ratios.items()]
    report.emit(options.out)


def _some(prompts: Sequence[str], round_: int) -> Sequence[str]:
    """All prompts, or a few of them in a warm-up round."""
    return prompts if round_ >= 0 else prompts[:4]


def _with_bon(bon: BestOfN, prompts: Sequence[str]) -> Outcome:
    results = list(bon.map(prompts))
    tokens = sum(r.usage.policy_completion_tokens + r.usage.scorer_completion_tokens for r in results)
    return Outcome(float(np.mean([r.reward or 0.0 for r in results])), tokens)


class PlainLoop:
    """Best-of-N as one writes it with transformers: `generate`, then a loop over the candidates."""

    def __init__(self, model: Path, options: argparse.Namespace) -> None:
        self.model, self.tokenizer = load(model, device=options.device, dtype=options.dtype)
        self.tokenizer.padding_side = "left"
        self.n, self.max_tokens = options.n, options.max_tokens
        self.style, self.similarity = load_style("direct"), WordF1()

    def __call__(self, prompts: Sequence[str], *, batched: bool) -> Outcome:
        """Best-of-n for each prompt; ``batched`` scores a prompt's candidates in one call of ``generate``."""
        rewards, tokens = [], 0
        for prompt in prompts:
            candidates, spent = self._generate([[{"role": "user", "content": prompt}]], n=self.n)
            questions = [self._question(prompt, text) for text in candidates]
            inferred: list[str] = []
            for batch in [questions] if batched else [[question] for question in questions]:
                texts, used = self._generate(batch, n=1)
                inferred += texts
                spent += used
            rewards.append(max(self.similarity(text, prompt).f1 for text in inferred))
            tokens += spent
        return Outcome(float(np.mean(rewards)), tokens)

    def _question(self, prompt: str, response: str) -> list[dict[str, str]]:
        asked = self.style.prompt(Task.of(prompt), response)
        return [{"role": turn.role, "content": turn.text} for turn in asked.turns]

    def _generate(self, conversations: list[list[dict[str, str]]], n: int) -> tuple[list[str], int]:
        """Texts, and how many tokens were decoded: sampled when n > 1, else greedily."""
        how: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if n > 1 else {}
        inputs = self.tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        ).to(self.model.device)
        with torch.inference_mode():
            output = self.model.generate(
                **inputs, **(how or {"do_sample": False}), num_return_sequences=n, max_new_tokens=self.max_tokens
            )
        new = output[:, inputs["input_ids"].shape[1] :]
        tokens = int((new != self.tokenizer.pad_token_id).sum())
        return self.tokenizer.batch_decode(new, skip_special_tokens=True), tokens


def _options(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--engine", default="torch", choices=["torch"], help="what runs bon's models")
    options.add_argument("--policy", type=Path, help="folder of policy and scorer; the mini model when not given")
    options.add_argument("--prompts", type=int, metavar="COUNT", help="from the mini world; 200, or 12 with --quick")
    options.add_argument("--n", type=int, default=8, help="candidates for each prompt")
    options.add_argument("--max-tokens", type=int, default=96, help="of a response and of a reconstruction")
    return options.parse_args(argv)


if __name__ == "__main__":
    main()
