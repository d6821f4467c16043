"""Skipping work never changes the winner: same candidate, same reward, with pruning on and off."""

import asyncio
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring import group_of, scored

from bon.engines.base import Completion, Partial
from bon.engines.scripted import ScriptedEngine
from bon.scorers.flip import Flip
from bon.selectors import Best
from bon.similarity import as_similarity

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


class Shuffled(ScriptedEngine):
    """Writes a few characters at a time, at a speed of its own for every row, so rows finish in random order."""

    def __init__(self, answers, seed):
        super().__init__(["unused"])
        self.answers, self.random = answers, random.Random(seed)

    async def generate(self, requests, *, keep=None):
        rows = {
            (i, sample): self.answers[int(request.prompt.turns[-1].pieces[1])][sample]
            for i, request in enumerate(requests)
            for sample in request.samples
        }
        written = dict.fromkeys(rows, 0)
        while rows:
            await asyncio.sleep(0)
            row = self.random.choice(list(rows))
            written[row] += self.random.choice([1, 2, 3, 5, 8, 40])
            text = rows[row][: written[row]]
            self.decoded += 1
            ended = written[row] > len(rows[row])
            if ended or (keep and not keep(Partial(*row, text, written[row]))):
                full = rows.pop(row)
                # Log-probabilities take few values so that they tie as well.
                yield Completion(
                    *row,
                    text,
                    "stop" if ended else "abort",
                    cumulative_logprob=-float(len(full) % 3),
                    completion_tokens=1,
                )


def scores(flip, instruction, count, **options):
    group = group_of(instruction, [str(i) for i in range(count)], **options)
    scored(flip, group)
    return list(group.scores), group.result(Best()).selection


def winners(instruction, answers, seed, **options):
    """The selection with and without pruning, and the scores of both."""
    samples = len(answers[0])
    run = [
        scores(Flip(Shuffled(answers, seed), samples=samples, **options), instruction, len(answers), prune=prune)
        for prune in (True, False)
    ]
    return run[0], run[1]


def check(instruction, answers, seed, **options):
    (pruned, with_pruning), (every, without) = winners(instruction, answers, seed, **options)
    assert with_pruning.best == without.best
    for few, full in zip(pruned, every, strict=True):
        assert full.status != "pruned"
        if few.status == "pruned":
            assert few.reward is None
            assert few.reason
            assert full.reward is None or full.reward <= few.upper_bound
            assert full.reward is None or full.reward < every[without.best].reward
        else:
            assert (few.reward, few.tie_break, few.status) == (full.reward, full.tie_break, full.status)
    return sum(s.status == "pruned" for s in pruned)


vocabulary = [
    "write",
    "a",
    "the",
    "short",
    "haiku",
    "about",
    "rain",
    "rain,",
    "foo-bar",
    "foobar",
    "poem",
    "-",
    "an",
    "'",
    "é",
]
wrappers = st.sampled_from(
    [
        "{}",
        "Instruction: {}",
        '"{}"',
        "“{}”",
        "<think>write a haiku</think>{}",
        "{}<think>poem",
        "{} </think> rain",
        "\n\n{}\n",
    ]
)
json_wrappers = st.sampled_from(
    [
        '{{"reasoning": "write a poem poem", "instruction": "{}"}}',
        '{{"reasoning": "poem", "instruction": "{}", "note": "poem poem"}}',
        "{{'reasoning': 'it's', 'instruction': '{}'}}",
        '```json\n{{"reasoning": "a", "instruction": "{}"\n```',
        '{{"instruction": "{} "quoted", poem" }}',
        '{{"instruction": "\\u00e9 {}\\n \\ud83d\\ude00',
        '{{"reasoning": "{}"}}',
        "{}",
    ]
)


@st.composite
def cases(draw, wrapper, samples):
    """An instruction, and answers close enough to it, and to each other, for one word to decide."""
    instruction = draw(st.lists(st.sampled_from(vocabulary), min_size=1, max_size=9))

    def answer():
        words = list(instruction)
        for _ in range(draw(st.sampled_from([0, 1, 1, 2, 2, 3, 12]))):
            at = draw(st.integers(0, len(words)))
            words[at : at + draw(st.integers(0, 1))] = draw(st.lists(st.sampled_from(vocabulary), max_size=2))
        return draw(wrapper).format(" ".join(words))

    count = draw(st.integers(2, 6))
    return " ".join(instruction), [[answer() for _ in range(samples)] for _ in range(count)]


seeds = st.integers(0, 999)


@given(cases(wrappers, 1), seeds, st.sampled_from(["word_f1", "word_f1_unicode", "rouge_l"]))
@settings(max_examples=120)
def test_pruning_never_changes_the_winner_of_bare_instructions(case, seed, similarity):
    check(*case, seed, similarity=similarity)


@given(cases(json_wrappers, 1), seeds)
@settings(max_examples=120)
def test_pruning_never_changes_the_winner_of_json_answers(case, seed):
    check(*case, seed, style="json")


@given(cases(wrappers, 3), seeds)
@settings(max_examples=120)
def test_pruning_never_changes_the_winner_of_means_over_samples(case, seed):
    check(*case, seed)


@given(cases(json_wrappers, 1), seeds)
@settings(max_examples=50)
def test_the_reference_parser_and_metrics_without_a_bound_prune_nothing(case, seed):
    assert check(*case, seed, style="json", parser="reference") == 0
    assert check(*case, seed, similarity="char_ngram_f1") == 0


def real_sets(name, count):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not in ../shared/data")
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(next(lines)) for _ in range(count)]
    draw = random.Random(7)
    for row in rows:
        instruction = row["messages"][-1]["content"]
        own, others = instruction.split(), " ".join(row["candidates"]).split()
        answers = []
        for _ in range(8):
            kept = [w if draw.random() < 0.8 else draw.choice(others or own) for w in own[:80]]
            answers.append([" ".join(kept + draw.choices(others or own, k=draw.randrange(20)))])
        yield instruction, answers


@pytest.mark.parametrize("name", ["llmbar.jsonl", "alpacaeval_dev.jsonl"])
def test_pruning_never_changes_the_winner_on_real_instructions_and_saves_work(name):
    given_up = 0
    for seed, (instruction, answers) in enumerate(real_sets(name, 60)):
        given_up += check(instruction, answers, seed)
    assert given_up > 0


@given(cases(wrappers, 1), seeds)
@settings(max_examples=100)
def test_stopping_at_the_maximum_keeps_the_winners_reward(case, seed):
    instruction, answers = case
    every, full = scores(Flip(Shuffled(answers, seed)), instruction, len(answers), prune=False)
    stopped, early = scores(Flip(Shuffled(answers, seed)), instruction, len(answers), prune=False, stop_at=1.0)
    if full.best is None:
        assert early.best is None
    else:
        assert stopped[early.best].reward == every[full.best].reward


def test_reaching_the_reward_to_stop_at_gives_up_what_is_unfinished():
    answers = [["write haiku"], ["write haiku and then go on for a very long time " * 9]]
    stopped, selection = scores(Flip(Shuffled(answers, 1)), "write haiku", 2, prune=False, stop_at=1.0)
    assert selection.best == 0
    assert stopped[1].status == "pruned"
    assert "has reached" in stopped[1].reason


def test_a_candidate_that_can_still_tie_is_not_given_up():
    """Only what is strictly below is pruned, so ties are still decided by the stated rule."""
    instruction = "w x y z"
    answers = [["w x y z one"], ["one w x y z"]]
    assert check(instruction, answers, 0) == 0


def test_what_was_saved_is_decode_steps():
    answers = [["write haiku"], ["nothing of what was asked for here " * 20]]
    engines = [Shuffled(answers, 3), Shuffled(answers, 3)]
    for engine, prune in zip(engines, (True, False), strict=True):
        scores(Flip(engine), "write haiku", 2, prune=prune)
    assert engines[0].decoded < engines[1].decoded / 2


def test_scripted_engine_and_flip_prune_together():
    engine = ScriptedEngine(lambda prompt, draw: "write haiku" if prompt.endswith("0") else "no " * 50)
    found, selection = scores(Flip(engine), "write haiku", 2, prune=True)
    assert selection.best == 0
    assert found[1].status == "pruned"
    assert found[1].tokens < 10
    assert found[1].upper_bound == pytest.approx(2 * 2 / (2 * 2 + found[1].tokens - 1))
    assert as_similarity("word_f1")("no " * 50, "write haiku").f1 <= found[1].upper_bound


class Read:
    """A similarity whose bound counts the characters that it is shown."""

    name, maximum = "read", 1.0

    def __init__(self):
        self.characters = 0

    def __call__(self, inferred, instruction):
        return as_similarity("word_f1")(inferred, instruction)

    def bound(self, instruction):
        return self

    def update(self, text):
        self.characters += len(text)
        return 1.0


def test_a_long_reconstruction_is_read_in_linear_time():
    """It was read from the start every few tokens, however long it had become."""

    def read(words):
        similarity = Read()
        engine = ScriptedEngine(["rain " * words])
        flip = Flip(engine, similarity=similarity, sampling={"max_tokens": words})
        scored(flip, group_of("rain", ["snow"], prune=True))
        return similarity.characters

    assert read(2000) <= 2.2 * read(1000)
