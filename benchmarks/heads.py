"""What a head learns from a few labelled candidates of the mini world, beside FLIP: AUC on prompts it never saw.

python benchmarks/heads.py > benchmarks/results/heads.json

25 held-out prompts with 8 candidates each are labelled by the verifier and train the heads; 100 others are scored.
The AUC is over all candidates together, and within prompts (``in_row``: the share of right and wrong answers to the
same prompt that are in order, each prompt counted once), with 95% intervals over prompts for the latter.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bon import BestOfN, Sampling, portal
from bon.evals.dataset import as_dataset
from bon.evals.metrics import bootstrap, interval
from bon.heads.data import Labelled, States
from bon.heads.training import train
from bon.mini.tasks import instruction, sample_tasks, verify
from bon.models import ModelPool
from bon.pipeline import score
from bon.types import Score


def main(argv: list[str] | None = None) -> None:
    """Sample, train, score, and print one JSON object."""
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--train", type=int, default=25, help="prompts with labels")
    options.add_argument("--test", type=int, default=100, help="prompts that are scored")
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args(argv)
    tasks = sample_tasks(chosen.train + chosen.test, chosen.seed, "heldout")
    prompts = [instruction(task) for task in tasks]
    with BestOfN(scorer="first", n=8, sampling=Sampling(seed=chosen.seed, max_tokens=96)) as policy:
        texts = [[candidate.text for candidate in result.candidates] for result in policy.map(prompts)]
    labels = [[float(verify(task, text)) for text in row] for task, row in zip(tasks, texts, strict=True)]
    rows = [
        {"prompt": prompt, "candidates": row, "correct": right}
        for prompt, row, right in zip(prompts, texts, labels, strict=True)
    ]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        scorers = {"flip": "flip:mini", "longest": "longest"}
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[: chosen.train]))
        engine: Any = ModelPool().engine("mini")
        for kind in ("probe", "bnrm"):
            head = train(as_dataset(str(file)), engine, "mini", kind, seed=chosen.seed, kept=file.with_suffix(".npz"))
            head.save(file.with_name(kind))
            scorers[kind] = f"head:{file.with_name(kind)}"
            found[f"{kind}_trained"] = {"settings": head.header.settings, **head.header.report}
        for name, spec in scorers.items():
            groups = portal.run(score(spec, [*zip(prompts, texts, strict=True)][chosen.train :]))
            found[name] = _figures([group.scores for group in groups], labels[chosen.train :])
    conditions = {"machine": platform.machine(), "python": platform.python_version(), **vars(chosen)}
    print(json.dumps({"benchmark": "heads", **found, "conditions": conditions}))


def _figures(scores: Sequence[Sequence[Score]], labels: Sequence[Sequence[float]]) -> dict[str, Any]:
    rewards = np.array([[-1.0 if each.reward is None else each.reward for each in row] for row in scores]).ravel()
    names = np.repeat(np.arange(len(scores)), [len(row) for row in scores])
    right, none = np.concatenate([np.array(row) for row in labels]), np.zeros((len(rewards), 1, 1))
    together = Labelled(States((), none, none[:, 0]), right, right, np.zeros_like(names))
    rows = Labelled(together.states, right, right, names)
    in_order = rows.in_order(rewards)
    usage = [each.usage for row in scores for each in row if each.same_as is None]
    return {
        "auc": float(together.in_order(rewards)[0]),
        "in_row": interval(bootstrap(len(in_order), 0), in_order),
        "read": sum(each.scorer_prompt_tokens for each in usage),
        "written": sum(each.scorer_completion_tokens for each in usage),
    }


if __name__ == "__main__":
    main()
