"""``bon.integrations.trl.reward``: what it says of its arguments, and TRL's own trainers with it (marker ``trl``)."""

from __future__ import annotations

import asyncio
import inspect
import logging
from pathlib import Path
from typing import Any

import pytest

from bon import Flip, score
from bon.engines.scripted import ScriptedEngine
from bon.errors import BonError, InputError, UnknownNameError
from bon.integrations.trl import reward
from bon.mini import WEIGHTS
from bon.mini.tasks import sample_instructions

PROMPTS = sample_instructions(4, seed=3, split="train")
SAID = ["Hello Anna, this is a reminder to water the plants.", "Dear Tom, thank you."]


def chat(role: str, *texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": role, "content": text}] for text in texts]


def call(function: Any, *args: Any, **named: Any) -> list[float | None]:
    return asyncio.run(function(*args, **named))


def lengths(prompt: Any, responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


# --- Rewards ---------------------------------------------------------------------------------------------------------


def test_it_is_an_async_function_with_a_readable_name() -> None:
    function = reward("flip:mini")
    assert inspect.iscoroutinefunction(function)
    assert function.__name__ == "flip-direct(mini)"
    assert reward(lengths).__name__ == "lengths"
    assert reward(lengths, name="short").__name__ == "short"


def test_the_rewards_are_those_of_score_for_texts_and_for_conversations_alike() -> None:
    prompts, texts = [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, [*SAID, SAID[1], PROMPTS[1]]
    expected = asyncio.run(score("flip:mini", [(PROMPTS[0], texts[:2]), (PROMPTS[1], texts[2:])]))
    function = reward("flip:mini")
    plain = call(function, prompts=prompts, completions=texts)
    assert plain == [each for group in expected for each in group.rewards]
    assert len({*plain}) > 2
    turns = call(function, prompts=chat("user", *prompts), completions=chat("assistant", *texts))
    assert turns == plain


def test_completions_of_one_prompt_are_one_group_and_the_columns_reach_the_function() -> None:
    seen = []

    def noting(prompt: str, responses: list[str], task: Any) -> list[float]:
        seen.append((prompt, responses, task.reference, dict(task.metadata)))
        return [0.5] * len(responses)

    given = {"prompts": ["a", "a", "b", "b"], "completions": ["1", "1", "2", "3"], "completion_ids": [[1]] * 4}
    call(reward(noting, reference="answer"), **given, answer=[7, 7, 8, 8], level=["x"] * 4, trainer_state=object())
    assert seen == [("a", ["1", "1"], "7", {"level": "x"}), ("b", ["2", "3"], "8", {"level": "x"})]


def test_a_prompt_that_comes_back_with_other_columns_is_another_group() -> None:
    sizes: list[int] = []

    def noting(prompt: str, responses: list[str]) -> list[float]:
        sizes.append(len(responses))
        return [0.0] * len(responses)

    call(reward(noting), prompts=["a"] * 3, completions=["1", "2", "3"], answer=[1, 1, 2])
    assert sorted(sizes) == [1, 2]


def test_the_instruction_may_be_a_part_of_the_prompt() -> None:
    said: list[str] = []

    def noting(prompt: str, responses: list[str], task: Any) -> list[float]:
        said.append(task.instruction)
        return [0.0] * len(responses)

    call(
        reward(noting, instruction="asked"), prompts=["Be brief. Say hello."], completions=["hi"], asked=["Say hello."]
    )
    assert said == ["Say hello."]


def test_the_assistants_last_word_is_the_answer() -> None:
    turns = [
        [
            {"role": "assistant", "content": None},
            {"role": "tool", "content": "42"},
            {"role": "assistant", "content": "ok"},
        ],
        [{"role": "assistant", "content": [{"type": "text", "text": "abc"}]}],
    ]
    assert call(reward(lengths), prompts=["a", "a"], completions=turns) == [2.0, 3.0]


def test_a_completion_without_a_reward_is_none_and_a_sentence_says_so(caplog: pytest.LogCaptureFixture) -> None:
    metrics: dict[str, float] = {}
    extra: dict[str, list[Any]] = {}
    keywords = {"log_metric": metrics.__setitem__, "log_extra": extra.__setitem__}
    tool = [{"role": "tool", "content": "nothing was said after it"}]
    with caplog.at_level(logging.WARNING, "bon"):
        found = call(reward(lengths), prompts=["a"] * 3, completions=[*chat("assistant", "ab", " "), tool], **keywords)
    assert found == [2.0, None, None]
    assert "2 of 3 completions have no reward (no text)" in caplog.text
    assert metrics == {"lengths/without_reward": 2 / 3, "lengths/echo": 0.0}
    assert extra == {"lengths inferred": [None] * 3}
    assert call(reward(lengths, missing=-1.0), prompts=["a", "a"], completions=["ab", ""]) == [2.0, -1.0]


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "given", "says"),
    [
        ({"reference": "answer"}, {"level": [1]}, "needs the column 'answer' (reference=).*It has: 'level'"),
        ({"instruction": "asked"}, {}, "needs the column 'asked' (instruction=).*It has: none"),
        ({}, {"prompts": None}, "prompts is None"),
        ({}, {"completions": "text"}, "completions is 'text'"),
        ({}, {"completions": ["a", "b"]}, "got 1 prompts and 2 completions"),
        ({}, {"level": [1, 2]}, "got 1 prompts and 2 level"),
        ({}, {"completions": [7]}, "completion 0 must be text or a list of messages.* not 7"),
        ({}, {"completions": [["text"]]}, "completion 0 must be text or a list of messages"),
        ({}, {"prompts": [""]}, "prompt 0: the prompt is empty"),
        ({}, {"prompts": [[{"role": "user"}]]}, "prompt 0: messages.0..content must be text"),
        ({"instruction": "asked"}, {"asked": ["b"]}, "prompt 0: the instruction must be part"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_call_is_one_sentence(named: Any, given: Any, says: str) -> None:
    pattern = says.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(InputError, match=pattern):
        call(reward(lengths, **named), **{"prompts": ["a"], "completions": ["b"], **given})


def test_a_scorer_that_does_not_exist_is_refused_before_the_training() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'flip'"):
        reward("flipp")
    with pytest.raises(InputError, match="logprob-mean needs the log-probabilities of the policy's samples"):
        reward("logprob")


def test_a_model_that_fails_ends_the_training_and_is_no_reward() -> None:
    def breaks(text: str, draw: int) -> str:
        raise ConnectionError("it is gone")

    with pytest.raises(BonError, match="it is gone"):
        call(reward(Flip(ScriptedEngine(breaks))), prompts=["a"], completions=["b"])

    def raises(prompt: str, responses: list[str]) -> list[float]:
        raise KeyError("answer")

    with pytest.raises(InputError, match="'raises' raised KeyError: 'answer'"):
        call(reward(raises), prompts=["a"], completions=["b"])


# --- With TRL --------------------------------------------------------------------------------------------------------

trl = pytest.mark.trl


@pytest.fixture
def trained(tmp_path: Path) -> Any:
    """A function that makes two steps of GRPO on the mini model with a reward, and returns the trainer."""

    def train(function: Any, rows: list[dict[str, Any]]) -> Any:
        module = pytest.importorskip("trl")
        from datasets import Dataset

        from bon.engines.loading import load

        model, tokenizer = load(WEIGHTS)
        how = module.GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=48,
            max_steps=2,
            learning_rate=1e-3,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            log_completions=False,
        )
        trainer = module.GRPOTrainer(
            model=model,
            reward_funcs=function,
            args=how,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
        return trainer

    return train


@trl
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("conversational", [True, False])
def test_a_grpo_trainer_learns_from_a_frozen_scorer(trained: Any, conversational: bool) -> None:
    from bon.engines.loading import load

    asked = chat("user", *PROMPTS) if conversational else PROMPTS
    trainer = trained(reward("flip:mini"), [{"prompt": prompt, "level": 1} for prompt in asked])
    steps = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(steps) == 2
    assert all(0 < step["rewards/flip-direct(mini)/mean"] <= 1 for step in steps)
    if conversational:  # else the model, without its chat template, may have nothing to say
        assert all(step["flip-direct(mini)/without_reward"] == 0 for step in steps)
    before, after = load(WEIGHTS)[0].state_dict(), trainer.model.state_dict()
    assert any(not after[name].equal(before[name]) for name in before)


@trl
@pytest.mark.filterwarnings("ignore")
def test_a_trainer_goes_on_where_some_completions_have_no_reward(
    trained: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def first_alone(prompt: Any, responses: list[str]) -> list[float | None]:
        return [1.0, 0.0, *[None] * (len(responses) - 2)]

    with caplog.at_level(logging.WARNING, "bon"):
        trainer = trained(reward(first_alone), [{"prompt": prompt} for prompt in chat("user", *PROMPTS)])
    assert trainer.state.global_step == 2
    assert "first_alone: 4 of 8 completions have no reward" in caplog.text
    step = next(entry for entry in trainer.state.log_history if "reward" in entry)
    assert step["reward"] == 0.5


@trl
@pytest.mark.filterwarnings("ignore")
def test_a_column_that_the_dataset_lacks_ends_the_training_with_a_sentence(trained: Any) -> None:
    with pytest.raises(InputError, match="needs the column 'answer'"):
        trained(reward(lengths, reference="answer"), [{"prompt": prompt} for prompt in PROMPTS])
