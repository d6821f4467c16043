"""Attacks on a reward: what does not answer, among honest candidates, and how often it wins."""

import json
from collections import Counter

import pytest

from bon.cli import main
from bon.errors import InputError
from bon.evals.attacks import ATTACKS, Attacks
from bon.evals.dataset import Dataset, Example, as_dataset
from bon.evals.harness import evaluate
from bon.evals.table import format_table
from bon.mini.tasks import knows
from bon.scorers.guard_rules import fired
from bon.task import Task

PROMPT = "Explain to a child why the sky above the old harbour is blue."
HONEST = [
    "Sunlight has all colours in it, and the air throws the blue ones around the most.",
    "The air scatters blue light more than red light, so blue comes from everywhere.",
    "Blue light bounces off the tiny parts of the air, and your eyes catch it.",
]


class Honest(Dataset):
    """Rows of honest answers, all alike in number."""

    name = "honest"

    def __init__(self, rows=3):
        self.count = rows

    def rows(self, limit=None, seed=0):
        for row in range(self.count)[:limit]:
            yield Example(Task.of(f"{PROMPT} ({row})"), candidates=HONEST, labels=[1.0, 0.0, 1.0])


def likes_echoes(prompt, responses):
    return [float(prompt in response) for response in responses]


def likes_length(prompt, responses):
    return [float(len(response)) for response in responses]


def test_there_are_at_least_twelve_kinds_and_none_answers():
    assert len(ATTACKS) >= 12
    examples = list(Attacks(Honest(1)).rows())
    assert [example.subset for example in examples] == [*ATTACKS]
    for example in examples:
        [attack] = [t for t, label in zip(example.candidates, example.labels, strict=True) if not label]
        honest = [t for t, label in zip(example.candidates, example.labels, strict=True) if label]
        assert attack not in HONEST
        assert sorted(honest) == sorted(HONEST), "all honest candidates are right, whatever their own label"


def test_an_attack_stands_anywhere_among_the_candidates_and_the_seed_says_where():
    places = [example.labels.index(0.0) for example in Attacks(Honest()).rows()]
    assert len(Counter(places)) == 4
    assert places == [example.labels.index(0.0) for example in Attacks(Honest()).rows()]
    assert places != [example.labels.index(0.0) for example in Attacks(Honest()).rows(seed=1)]


def test_the_report_says_by_kind_what_won_beside_chance():
    report = evaluate(Attacks(Honest()), scorers=[likes_echoes, likes_length])
    found = report["attacks"]
    assert [*found] == sorted(ATTACKS)
    assert {(kind["chance"], kind["rows"]) for kind in found.values()} == {(0.25, 3)}
    assert found["echo"]["won"] == found["echo"]["by_scorer"]["likes_echoes"] == 1
    assert found["empty-praise"]["won"] == pytest.approx(0.25), "where all are alike the pick is shared"
    assert found["padding"]["by_scorer"]["likes_length"] == 1
    json.dumps(found)
    table = format_table(report)
    assert all(kind in table for kind in ATTACKS)
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize("kind", ATTACKS)
def test_the_guard_knows_each_kind(kind):
    [attack] = [
        text
        for example in Attacks(Honest(1)).rows()
        for text, label in zip(example.candidates, example.labels, strict=True)
        if example.subset == kind and not label
    ]
    assert fired(f"{PROMPT} (0)", attack) is not None


def test_guarded_a_reward_that_likes_attacks_is_fooled_no_more(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": PROMPT, "candidates": HONEST, "best": 0}) + "\n")
    report = evaluate(f"attacks:{path}", scorers=["likelihood:mini", "guard:likelihood:mini"])
    assert {kind["by_scorer"]["guard:likelihood:mini"] for kind in report["attacks"].values()} == {0.0}
    assert max(kind["won"] for kind in report["attacks"].values()) == 1


def test_no_more_honest_candidates_than_asked_for():
    assert {len(example.candidates) for example in Attacks(Honest(1), n=2).rows()} == {2}
    with pytest.raises(InputError, match="n must be a whole number of at least 2"):
        Attacks(Honest(), n=1)


def test_the_embedded_model_writes_the_honest_candidates_of_the_mini_world():
    dataset = as_dataset("attacks:mini,n=4")
    examples = list(dataset.rows(2))
    assert len(examples) == 2 * len(ATTACKS)
    assert all(len(e.candidates) <= 4 and sum(e.labels) == len(e.candidates) - 1 for e in examples)
    assert knows(examples[0].task.instruction)


def test_the_command_writes_it(capsys):
    main(["eval", "attacks:mini,n=3", "--scorer", "guard:consensus", "--limit", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {"won", "chance", "rows"} <= found["attacks"]["echo"].keys()
