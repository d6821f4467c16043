"""From scored rows to the figures of a report: of each scorer and each baseline, and of all together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from bon.evals.baselines import repeated
from bon.evals.dataset import Dataset
from bon.evals.inversion import inversion
from bon.evals.metrics import Floats, bootstrap, equal_pool, expected_best, interval, spearman
from bon.evals.rows import ScoredRow

_BINS = 4
_DISAGREEMENTS = 12


@dataclass(frozen=True)
class Summary:
    """The figures of one dataset.

    Args:
        rows: at least one.
        dataset: whose rows they are.
        spent: for each scorer, its tokens and seconds.
        policy: those of a policy for all candidates.
        bigger: those of a bigger model for its answers, and its name before them.
        seed: of the bootstrap and of the rows that the inversion check compares with.
    """

    rows: Sequence[ScoredRow]
    dataset: Dataset
    spent: Mapping[str, tuple[int, float]]
    policy: tuple[int, float] | None = None
    bigger: tuple[str, int, float] | None = None
    seed: int = 0

    @cached_property
    def _weights(self) -> Floats:
        return bootstrap(len(self.rows), self.seed)

    @cached_property
    def _picks(self) -> dict[str, Floats]:
        """The expected label of the pick in each row, by scorer or baseline."""
        names = [name for name in self.rows[0].rewards if all(name in row.rewards for row in self.rows)]
        names[-1:-1] = self._singles
        return {name: np.array([row.pick(name) for row in self.rows]) for name in names}

    @property
    def _singles(self) -> Sequence[str]:
        """Rules that are one answer and no order of the candidates."""
        return [*self.rows[0].row.singles]

    def report(self) -> dict[str, Any]:
        """What the rows say.

        Returns:
            ``rows``, ``n`` (candidates of a row at most), ``policy_tokens``, ``policy_seconds`` and ``bigger`` (see
            ``_at_equal_time``), None without such a model; ``inversion``, ``diagnosis``, ``subsets``,
            ``disagreements``, and ``scorers``, where by scorer or baseline stand

            - ``kind``; ``score``, the mean label of the pick, ties decided by ``tie_break`` and tokens as in ``Best``
              and then shared; ``best_of``, the same for N candidates (rows with fewer take all), scored as they were
              among all: to scorers that look at the whole group, and to consensus, fewer may look different;
              ``official``, what the dataset's own protocol says, by name, where there is one;
            - ``share`` of the way from a random pick to the best, the pick's label ``minus_random`` and
              ``minus_longest``, with paired 95% intervals over rows; None where no row's labels differ;
            - ``by_length``, rows in bins of their candidates' median words; ``correlation``, the mean rank correlation
              within rows of the reward with label, length in words, and the share of the prompt that comes again;
            - ``same_strength``, the share of the way in the pool of ``equal_pool``;
            - ``failed`` and ``pruned`` shares of scores, the share of rows whose best reward is ``tied`` until the
              tie-break;
            - ``tokens``, ``seconds``, ``tokens_per_correct``: for each pick of the best in a row whose labels differ.
        """
        pool = equal_pool([row.labels for row in self.rows], [row.row.generators for row in self.rows])
        lengths = [np.array([len(text.split()) for text in row.texts], float) for row in self.rows]
        echoes = [np.array([repeated(row.prompt, text) for text in row.texts]) for row in self.rows]
        return {
            "rows": len(self.rows),
            "n": self._n,
            "policy_tokens": self.policy and self.policy[0],
            "policy_seconds": self.policy and self.policy[1],
            "bigger": self._at_equal_time(),
            "scorers": {name: self._rule(name, pool, lengths, echoes) for name in self._picks},
            "inversion": self._inversions(),
            "diagnosis": self._diagnosis(),
            "subsets": self._subsets(),
            "disagreements": self._disagreements(),
        }

    def _rule(
        self, name: str, pool: Sequence[list[int]], lengths: Sequence[Floats], echoes: Sequence[Floats]
    ) -> dict[str, Any]:
        picks, random, best = (self._picks[rule] for rule in (name, "random", "oracle"))
        scores = [score for row in self.rows for score in row.scores.get(name, ())]
        statuses = [score.status for score in scores if score.reward is None]
        tokens, seconds = self.spent.get(name, (0, 0.0))
        ranked = name not in self._singles
        correct = sum(row.right(name) for row in self.rows) if name in self.spent else 0.0
        return {
            "kind": "scorer" if name in self.spent else "baseline",
            "score": float(picks.mean()),
            "official": self._official(name) if ranked else None,
            "share": interval(self._weights, picks - random, best - random),
            "minus_random": interval(self._weights, picks - random),
            "minus_longest": interval(self._weights, picks - self._picks["longest"]),
            "best_of": {
                str(size): float(np.mean([row.pick(name, size) for row in self.rows])) for size in self._sizes()
            },
            "by_length": self._by_length(name, lengths),
            "correlation": {
                with_what: self._correlation(name, values) if ranked else None
                for with_what, values in (
                    ("label", [row.labels for row in self.rows]),
                    ("length", lengths),
                    ("echo", echoes),
                )
            },
            "same_strength": self._same_strength(name, pool) if ranked else None,
            "failed": sum(status != "pruned" for status in statuses) / max(1, len(scores)),
            "tied": float(np.mean([row.tied(name) for row in self.rows])) if ranked else 0.0,
            "pruned": statuses.count("pruned") / max(1, len(scores)),
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_correct": tokens / correct if tokens and correct else None,
        }

    def _official(self, name: str) -> Mapping[str, float] | None:
        examples = [replace(row.row.example, candidates=row.texts, labels=row.labels.tolist()) for row in self.rows]
        return self.dataset.official(examples, [row.rewards[name].tolist() for row in self.rows])

    @property
    def _n(self) -> int:
        return max(len(row.texts) for row in self.rows)

    def _sizes(self) -> list[int]:
        """The powers of two up to the most candidates of a row, and that number."""
        return sorted({*(2**power for power in range(self._n.bit_length())), self._n})

    def _at_equal_time(self) -> dict[str, Any] | None:
        """What one answer of a bigger model is worth, and what each rule gets in no more time.

        Returns:
            ``name``, ``score``, ``tokens`` and ``seconds``; and ``equal_time`` with, for each scorer and baseline that
            orders the policy's candidates, the most candidates ``n`` that it can sample and score in those seconds and
            the ``score`` of its pick among them; None where there is no time for one.
        """
        if self.bigger is None or self.policy is None:
            return None
        name, tokens, seconds = self.bigger
        equal: dict[str, Any] = {}
        for rule in [rule for rule in self._picks if rule not in (*self._singles, "oracle")]:
            whole = self.policy[1] + self.spent.get(rule, (0, 0.0))[1]
            size = min(self._n, int(self._n * seconds / whole))
            equal[rule] = None
            if size:
                equal[rule] = {"n": size, "score": float(np.mean([row.pick(rule, size) for row in self.rows]))}
        score = float(self._picks["bigger"].mean())
        return {"name": name, "score": score, "tokens": tokens, "seconds": seconds, "equal_time": equal}

    def _by_length(self, name: str, lengths: Sequence[Floats]) -> list[dict[str, Any]]:
        medians = np.array([np.median(length) for length in lengths])
        bins = np.array_split(np.argsort(medians, kind="stable"), min(_BINS, len(medians)))
        return [
            {
                "words": [float(medians[part[0]]), float(medians[part[-1]])],
                "rows": len(part),
                "score": float(self._picks[name][part].mean()),
                "random": float(self._picks["random"][part].mean()),
            }
            for part in bins
        ]

    def _correlation(self, name: str, values: Sequence[Floats]) -> float | None:
        found = [spearman(row.rewards[name], of_row) for row, of_row in zip(self.rows, values, strict=True)]
        known = [value for value in found if value is not None]
        return float(np.mean(known)) if known else None

    def _same_strength(self, name: str, pool: Sequence[list[int]]) -> dict[str, Any] | None:
        """The share of the way in the pool of ``equal_pool``; None where no row has two of its candidates."""
        rows = sum(map(bool, pool))
        if not rows:
            return None
        picks = [
            [expected_best(row.labels[part], row.order[rule][part], len(part)) for rule in (name, "random", "oracle")]
            if part
            else [0.0, 0.0, 0.0]  # adds nothing, above or below
            for row, part in zip(self.rows, pool, strict=True)
        ]
        own, random, best = np.array(picks).T
        return {"rows": rows, "share": interval(self._weights, own - random, best - random)}

    def _inversions(self) -> dict[str, Any]:
        """The inversion check of each scorer whose details have an ``inferred`` instruction."""
        prompts = [row.prompt for row in self.rows]
        inferred = {
            name: [
                (i, score.details.inferred, text)
                for i, row in enumerate(self.rows)
                for text, score in zip(row.texts, row.scores[name], strict=True)
                if getattr(score.details, "inferred", None) is not None
            ]
            for name in self.spent
        }
        return {name: inversion(prompts, found, self.seed) for name, found in inferred.items() if found}

    def _diagnosis(self) -> str:
        """Whether the right answers are there and not picked, or not there; by the best of the scorers."""
        means = {name: float(picks.mean()) for name, picks in self._picks.items()}
        name = max(self.spent or means.keys() - {"oracle", *self._singles}, key=lambda rule: means[rule])
        best, picked = means["oracle"], means[name]
        labels = np.concatenate([row.labels for row in self.rows])
        passing = set(labels) <= {0.0, 1.0}
        top = 1.0 if passing else float(labels.max())
        what = "Selection" if best - picked >= top - best else "Sampling"
        if passing:
            return (
                f"{what}: {best:.0%} of the rows have a right answer among their candidates and {name} picks it in "
                f"{picked:.0%}; {100 * (best - picked):.0f} points are lost by picking, {100 * (1 - best):.0f} because "
                "no candidate is right."
            )
        return (
            f"{what}: the best candidate of a row has the label {best:.3g} on average and the pick of {name} "
            f"{picked:.3g}; {best - picked:.3g} is lost by picking, and {top - best:.3g} because no candidate is as "
            f"good as the best of all ({top:.3g})."
        )

    def _subsets(self) -> dict[str, Any]:
        subsets = np.array([row.row.example.subset for row in self.rows])
        return {
            str(subset): {
                "rows": int((subsets == subset).sum()),
                "scores": {name: float(picks[subsets == subset].mean()) for name, picks in self._picks.items()},
            }
            for subset in np.unique(subsets[subsets != ""])
        }

    def _disagreements(self) -> list[dict[str, Any]]:
        """The rows where the labels of the scorers' picks differ most; of a single scorer, from the best there is."""
        names = list(self.spent)
        rules = names if len(names) > 1 else [*names, "oracle"]
        picks = np.array([self._picks[name] for name in rules])
        gaps = np.ptp(picks, axis=0)
        found = [i for i in np.argsort(-gaps, kind="stable")[:_DISAGREEMENTS] if gaps[i] > 1e-9]  # rounding
        return [self._shown(self.rows[i]) for i in found] if names else []

    def _shown(self, row: ScoredRow) -> dict[str, Any]:
        return {
            "row": row.row.position,
            "prompt": row.prompt,
            "candidates": [
                {
                    "text": text,
                    "label": float(label),
                    "rewards": {name: scores[i].reward for name, scores in row.scores.items()},
                    "explanations": {
                        name: scores[i].explanation
                        for name, scores in row.scores.items()
                        if scores[i].explanation is not None
                    },
                }
                for i, (text, label) in enumerate(zip(row.texts, row.labels, strict=True))
            ],
            "picks": {name: int(np.argmax(row.order[name])) for name in row.scores},
        }
