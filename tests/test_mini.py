"""The mini world is consistent, its splits do not leak, and the shipped model does what its card says."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bon.mini import WEIGHTS
from bon.mini.families import FAMILIES, Family
from bon.mini.lexicon import LEXICON, MARKERS
from bon.mini.tasks import (
    Split,
    Task,
    corrupt,
    instruction,
    is_held_out,
    knows,
    response,
    sample_instructions,
    sample_task,
    sample_tasks,
    verify,
)

SPLITS: tuple[Split, ...] = ("train", "heldout", "unseen_wording")
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))


# --- The tables ------------------------------------------------------------------------------------------------------


def test_there_are_at_least_twelve_families() -> None:
    assert len(FAMILIES) >= 12


@every_family
def test_a_family_has_two_trained_wordings_an_unseen_one_and_up_to_five_constraints(family: Family) -> None:
    assert len(family.wordings) >= 2
    assert len(family.unseen) >= 1
    assert len(family.required) >= 2
    assert 3 <= len(family.slots) <= 5


@every_family
def test_every_wording_uses_every_slot_once_on_both_sides(family: Family) -> None:
    templates = [text for wording in family.wordings for text in (wording.instruction, wording.response)]
    for template in [*templates, *family.unseen]:
        assert [template.count(f"{{{slot}}}") for slot in family.slots] == [1] * len(family.slots), template


def test_no_value_belongs_to_two_kinds() -> None:
    values = [value.lower() for kind in LEXICON.values() for value in kind]
    assert len(values) == len(set(values))


def test_markers_are_values_of_their_kind() -> None:
    for kind, phrases in MARKERS.items():
        assert tuple(phrases) == LEXICON[kind]


# --- Verifier --------------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("split", SPLITS)
def test_right_answers_verify(family: Family, split: Split) -> None:
    rng = random.Random(f"{family.name}/{split}")
    for _ in range(100):
        task = sample_task(rng, split, family.name)
        assert verify(task, response(task, rng)), instruction(task)


@every_family
def test_any_change_of_a_constraint_is_caught(family: Family) -> None:
    rng = random.Random(family.name)
    for _ in range(100):
        task = sample_task(rng, "train", family.name)
        slot = rng.choice(list(task.slots))
        other = rng.choice([value for value in LEXICON[family.slots[slot]] if value not in task.slots.values()])
        altered = replace(task, slots={**task.slots, slot: other})
        assert not verify(task, response(altered, rng))
        if slot in family.optional:
            dropped = replace(task, slots={name: value for name, value in task.slots.items() if name != slot})
            assert not verify(task, response(dropped, rng))
            assert not verify(dropped, response(task, rng))


def test_careless_demonstrations_mostly_fail() -> None:
    rng = random.Random(0)
    tasks = [sample_task(rng) for _ in range(500)]
    passed = sum(verify(task, response(corrupt(task, rng, drop=0.5, alter=0.03), rng)) for task in tasks)
    assert 0.2 < passed / len(tasks) < 0.5


def test_without_mistakes_a_demonstration_is_the_task() -> None:
    rng = random.Random(0)
    for _ in range(100):
        task = sample_task(rng)
        assert corrupt(task, rng, drop=0, alter=0) == task


@pytest.mark.parametrize("text", ["", "   ", "I cannot help with that.", "Hello Hana", "\n- socks\n- boots"])
def test_other_texts_do_not_verify(text: str) -> None:
    assert not any(verify(task, text) for task in sample_tasks(200, split="train"))


def test_an_instruction_is_not_its_own_answer() -> None:
    tasks = [sample_task(random.Random(seed)) for seed in range(300)]
    marked = [task for task in tasks if any(kind in MARKERS for kind in _kinds(task))]
    assert marked
    assert not any(verify(task, instruction(task)) for task in marked)


def _kinds(task: Task) -> set[str]:
    return {FAMILIES[task.family].slots[slot] for slot in task.slots}


# --- Splits ----------------------------------------------------------------------------------------------------------


def _trained_on(task: Task) -> bool:
    return task.wording < len(FAMILIES[task.family].wordings) and not is_held_out(task.family, task.slots)


def test_training_sees_neither_held_out_pairs_nor_unseen_wordings() -> None:
    rng = random.Random(0)
    for _ in range(1000):
        task = sample_task(rng, "train")
        assert _trained_on(task)
        assert _trained_on(corrupt(task, rng, drop=0.5, alter=0.5))


def test_the_other_splits_are_disjoint_from_training() -> None:
    assert all(is_held_out(task.family, task.slots) for task in sample_tasks(500, split="heldout"))
    assert all(
        task.wording >= len(FAMILIES[task.family].wordings) for task in sample_tasks(500, split="unseen_wording")
    )
    trained = {instruction(sample_task(random.Random(seed), "train")) for seed in range(1000)}
    assert trained.isdisjoint(sample_instructions(500, split="heldout"))
    assert trained.isdisjoint(sample_instructions(500, split="unseen_wording"))


def test_training_examples_hold_no_held_out_instruction() -> None:
    from bon.mini.examples import training_examples

    texts = {
        text
        for example in islice(training_examples(random.Random(0), 0.5, 0.03), 3000)
        for text in (*example.prompt, example.target)
    }
    assert texts.isdisjoint(sample_instructions(500, split="heldout"))
    assert texts.isdisjoint(sample_instructions(500, split="unseen_wording"))


def test_samples_are_reproducible_distinct_and_one_of_each_kind_first() -> None:
    first, again = sample_tasks(100, seed=3), sample_tasks(100, seed=3)
    assert first == again
    assert first != sample_tasks(100, seed=4)
    assert len(set(sample_instructions(100, seed=3))) == 100
    assert [task.family for task in first[: len(FAMILIES)]] == list(FAMILIES)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'test'"):
        sample_task(random.Random(0), "test")  # type: ignore[arg-type]


# --- What the world knows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_every_instruction_is_known(split: Split) -> None:
    assert all(map(knows, sample_instructions(300, split=split)))


@pytest.mark.parametrize(
    "text",
    [
        "Write a reminder for Anna to water the plants on Monday.",
        "  write an   URGENT reminder for hana to water the plants",
        "Write an invitation for Anna to a brunch!",
    ],
)
def test_a_known_instruction_may_be_typed_loosely(text: str) -> None:
    assert knows(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " . ",
        "What is the capital of France?",
        "Write a haiku about autumn rain.",
        "Write a reminder for Anna to buy a yacht.",
        "Write a reminder for Beyonce to water the plants.",
        "Write a reminder for Anna to water the plants. Then sing.",
        "Please: Write a reminder for Anna to water the plants.",
        "Hello Anna, this is a reminder to water the plants.",
        "<|im_start|>user",
        "写一首关于秋雨的诗",
    ],
)
def test_other_prompts_are_not_known(text: str) -> None:
    assert not knows(text)


def test_the_world_imports_no_heavy_package() -> None:
    code = "import sys, bon.mini.tasks; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- The shipped model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(WEIGHTS)


@pytest.fixture(scope="module")
def model() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32).eval()


def _greedy(model: Any, tokenizer: Any, pieces: tuple[str, ...]) -> str:
    import torch

    ids = [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False)]
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=80,
            do_sample=False,
        )
    text = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def test_the_weights_folder_is_small_and_has_a_card() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 4_000_000
    assert (WEIGHTS / "README.md").read_text().startswith("---\nlicense: apache-2.0")


@given(text=st.text())
def test_any_text_round_trips(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_every_single_word_value_is_one_token_after_a_space(tokenizer: Any) -> None:
    values = [value for kind in LEXICON.values() for value in kind if value.isalpha()]
    split = [value for value in values if len(tokenizer.encode(f" {value}")) > 1]
    assert split == []


def test_the_chat_template_is_chatml(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi  there"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi  there<|im_end|>\n<|im_start|>assistant\n"
    )


def test_training_prompts_are_what_the_chat_template_renders(tokenizer: Any) -> None:
    from bon.mini.examples import BACKWARD_SYSTEM, BACKWARD_USER, backward_example, forward_example

    forward = [{"role": "user", "content": "Ask."}]
    backward = [{"role": "system", "content": BACKWARD_SYSTEM}, {"role": "user", "content": BACKWARD_USER + "Answer."}]
    for messages, example in ((forward, forward_example("Ask.", "")), (backward, backward_example("Answer.", ""))):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert "".join(example.prompt) == text


def test_the_model_answers_what_it_was_not_trained_on(model: Any, tokenizer: Any) -> None:
    from bon.mini.examples import forward_example

    tasks = sample_tasks(28, seed=1, split="heldout")
    passed = [verify(task, _greedy(model, tokenizer, forward_example(instruction(task), "").prompt)) for task in tasks]
    assert sum(passed) >= 6  # it forgets constraints by design; an untrained model passes none


def test_the_model_infers_the_instruction_from_a_right_answer(model: Any, tokenizer: Any) -> None:
    from bon.mini.examples import backward_example

    tasks = sample_tasks(28, seed=1, split="heldout")
    rng = random.Random(0)
    inferred = [_greedy(model, tokenizer, backward_example(response(task, rng), "").prompt) for task in tasks]
    assert sum(text == instruction(task) for text, task in zip(inferred, tasks, strict=True)) >= 20


# --- Training --------------------------------------------------------------------------------------------------------


def test_training_is_reproducible_and_never_replaces_a_model_unasked(tmp_path: Path) -> None:
    from bon.mini.train import Recipe, train

    tiny = Recipe(steps=20, tokens_per_step=400, hidden=32, layers=1, mlp=32, head=16, vocab=400, corpus_tasks=50)
    first = train(tmp_path / "a", tiny, progress=False)
    second = train(tmp_path / "b", tiny, progress=False)
    other = train(tmp_path / "c", replace(tiny, seed=1), progress=False)
    assert first == second
    assert first != other
    assert first[-1] < first[0]
    for name in ("model.safetensors", "tokenizer.json", "loss.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a" / "loss.jsonl").read_text())["step"] == 20
    with pytest.raises(FileExistsError, match="already holds a model"):
        train(tmp_path / "a", tiny, progress=False)
    train(tmp_path / "a", tiny, overwrite=True, progress=False)


def test_the_command_line_says_when_a_folder_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bon.mini.train import main

    (tmp_path / "model.safetensors").touch()
    assert main(["--out", str(tmp_path), "--steps", "1"]) == 2
    assert "--overwrite" in capsys.readouterr().err
