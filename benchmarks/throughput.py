"""Throughput over a file of prompts, against the plain loop that a user would write with transformers.

On the torch engine: 200 prompts with n=8 go through bon at least five times as fast as through
`generate(num_return_sequences=8)` and a loop that scores one candidate after the other, prompt by prompt
(`end_to_end`). A more careful loop, which scores a prompt's 8 candidates in one padded batch, is measured beside it
(`end_to_end_batched`). All sides use the same model, prompts, sampling, scoring prompt and reward.

With `--engine vllm`: 500 prompts with n=8 go through bon at nine tenths of the tokens a second of vLLM's own offline
`LLM.generate`, which gets the same token ids in two calls, all candidates and then all scoring prompts, and decodes the
same number of tokens for each (`offline_throughput`). A further side leaves out the log-probabilities with which bon
decides between equal rewards (`offline_throughput_no_tie_break`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bon import BestOfN
from bon.bench.harness import Pairs, Report, Spread, conditions, forget, interleave, table
from bon.engines.loading import load
from bon.mini import WEIGHTS
from bon.mini.tasks import sample_instructions
from bon.prompts import load_style
from bon.scorers.flip import Flip
from bon.similarity import WordF1
from bon.task import Task
from bon.types import Result, Sampling
from lib.opening import forced, model_options, open_models
from lib.scripts import parser, script

BON, VLLM = "bon", "vLLM's generate"
UNTIED = "bon, no tie-break"
PLAIN, BATCHED = "plain loop", "plain loop, batched scoring"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one side made of the prompts: mean reward of the winners, and tokens that were decoded."""

    reward: float | None
    tokens: int


def main(argv: list[str] | None = None) -> None:
    options = _options(argv)
    on_vllm = options.engine == "vllm"
    count = options.prompts or (12 if options.quick else 500 if on_vllm else 200)
    prompts = sample_instructions(count, options.seed)
    models = open_models(options)
    try:
        card = conditions(seed=options.seed, dtype=options.dtype, engine=options.engine, model=models.facts["policy"])
        report = Report("throughput", {**card, "prompts": count, "n": options.n, "max_tokens": options.max_tokens})
        extra = forced(models.policy) if models.dummy else {}
        bon = BestOfN(
            models.policy,
            Flip(models.scorer, sampling=Sampling(temperature=0.0, max_tokens=options.max_tokens, extra=extra)),
            n=options.n,
            sampling=Sampling(max_tokens=options.max_tokens, seed=options.seed, extra=extra),
        )
        (_beside_vllm if on_vllm else _beside_loops)(report, bon, prompts, options)
    finally:
        models.close()
    report.text += [f"{key}: {spread:.2f} (quartiles)" for key, spread in report.ratios.items()]
    report.emit(options.out)


def _beside_loops(report: Report, bon: BestOfN, prompts: Sequence[str], options: argparse.Namespace) -> None:
    """Bon and two plain loops: times of a loop / time of bon."""
    loop = PlainLoop(options.policy or WEIGHTS, options)
    sides: dict[str, Callable[[int], Outcome]] = {
        PLAIN: lambda round_: loop(_some(prompts, round_), batched=False),
        BATCHED: lambda round_: loop(_some(prompts, round_), batched=True),
        BON: lambda round_: _with_bon(bon, _some(prompts, round_))[0],
    }
    torch.manual_seed(options.seed)
    seconds = _measure(report, sides, options, len(prompts))
    for key, side in (("end_to_end", PLAIN), ("end_to_end_batched", BATCHED)):
        pairs = Pairs(key, {"prompts": len(prompts), "n": options.n}, (side, BON), seconds[side], seconds[BON])
        report.ratios[key] = pairs.ratio
        report.rows.append(pairs.to_dict())


def _beside_vllm(report: Report, bon: BestOfN, prompts: Sequence[str], options: argparse.Namespace) -> None:
    """Bon and vLLM's own offline engine on the same tokens: tokens a second of bon / of vLLM."""
    from lib.offline import Offline, requests_of

    engine: Any = bon.policy
    offline = Offline(engine)
    flip: Any = bon.scorer
    untied = bon.replace(scorer=Flip(flip.engine, sampling=flip.sampling.replace(logprobs=False), tie_break="none"))
    latest: list[Any] = []

    def side(best_of_n: BestOfN) -> Callable[[int], Outcome]:
        def run(round_: int) -> Outcome:
            outcome, latest[:] = _with_bon(best_of_n, _some(prompts, round_))
            return outcome

        return run

    def with_vllm(round_: int) -> Outcome:
        return Outcome(None, offline(*requests, bon.sampling))

    def prepare() -> None:
        """Empty both caches; what bon has just done is what vLLM does next."""
        forget(engine)
        offline.forget()
        requests[:] = requests_of(engine, bon.scorer, latest)  # type: ignore[arg-type]

    requests: list[Any] = []
    try:
        sides = {UNTIED: side(untied), BON: side(bon), VLLM: with_vllm}
        seconds = _measure(report, sides, options, len(prompts), prepare)
    finally:
        offline.close()
    for key, name in (("offline_throughput", BON), ("offline_throughput_no_tie_break", UNTIED)):
        pairs = Pairs(key, {"n": options.n}, (VLLM, name), seconds[VLLM], seconds[name])
        report.ratios[key] = pairs.ratio
        report.rows.append(pairs.to_dict())


def _measure(
    report: Report,
    sides: Mapping[str, Callable[[int], Outcome]],
    options: argparse.Namespace,
    count: int,
    before: Callable[[], None] | None = None,
) -> dict[str, list[float]]:
    """Run the sides in turn and report each; seconds of each side."""
    timed = interleave(sides, 1 if options.quick else 3, label="throughput", before=before)
    lines = []
    for name, of_side in timed.items():
        rewards = [t.value.reward for t in of_side if t.value.reward is not None]
        row = {
            "case": "side",
            "side": name,
            "seconds": Spread.of([t.seconds for t in of_side]).median,
            "prompts_per_s": Spread.of([count / t.seconds for t in of_side]).median,
            "tokens": of_side[0].value.tokens,
            "tokens_per_s": Spread.of([t.value.tokens / t.seconds for t in of_side]).median,
            "mean_best_reward": float(np.mean(rewards)) if rewards else None,
        }
        report.rows.append(row)
        digits = {"seconds": 1, "prompts_per_s": 1, "tokens": 0, "tokens_per_s": 0, "mean_best_reward": 3}
        lines.append([name, *("" if row[k] is None else f"{row[k]:.{d}f}" for k, d in digits.items())])
    headers = ["side", "seconds", "prompts/s", "tokens", "tokens/s", "mean best reward"]
    report.text.append(table(headers, lines))
    return {name: [t.seconds for t in of_side] for name, of_side in timed.items()}


def _some(prompts: Sequence[str], round_: int) -> Sequence[str]:
    """All prompts, or a few of them in a warm-up round."""
    return prompts if round_ >= 0 else prompts[:4]


def _with_bon(bon: BestOfN, prompts: Sequence[str]) -> tuple[Outcome, list[Result]]:
    results = [result for result in bon.map(prompts) if isinstance(result, Result)]
    tokens = sum(r.usage.policy_completion_tokens + r.usage.scorer_completion_tokens for r in results)
    return Outcome(float(np.mean([r.reward or 0.0 for r in results])), tokens), results


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
    options = parser(__doc__ or "")
    model_options(options)
    options.add_argument("--prompts", type=int, metavar="COUNT", help="torch 200, vllm 500; 12 with --quick")
    options.add_argument("--n", type=int, default=8, help="candidates for each prompt")
    options.add_argument("--max-tokens", type=int, default=96, help="of a response and of a reconstruction")
    return options.parse_args(argv)


if __name__ == "__main__":
    script(main)
