"""verl's reward function, as verl calls it; and by verl's own loader and reward manager, where it is installed."""

import asyncio
import inspect
from dataclasses import replace
from pathlib import Path

import pytest
from scoring import Own

from bon import portal
from bon.errors import EngineError, InputError
from bon.integrations import verl
from bon.integrations.batches import Batches
from bon.integrations.verl import compute_score
from bon.task import Task

PLANTS = "Write a reminder for Anna to water the plants on Monday."
GOOD, BAD = "Hello Anna, this is a reminder to water the plants on Monday.", "Dear Tom, thank you."
SCORER = "flip:mini"


def ask(text=GOOD, extra_info=None, *, scorer=SCORER, truth=None, **options):
    given = {"prompt": PLANTS} if extra_info is None else extra_info
    return compute_score("mini", text, truth, given, scorer=scorer, **options)


def test_the_reward_is_the_scorers_and_the_prompt_is_that_of_extra_info():
    good, bad = portal.run(ask()), portal.run(ask(BAD))
    assert (good, bad < 0.5) == (1.0, True)
    messages = [{"role": "user", "content": PLANTS}]
    assert portal.run(ask(extra_info={"prompt": messages, "index": 3})) == 1.0
    assert portal.run(ask(extra_info={"question": PLANTS})) == 1.0
    assert portal.run(ask(extra_info={"asked": PLANTS, "prompt": "Say hi."}, prompt="asked")) == 1.0
    assert verl.compute_score_blocking("mini", GOOD, None, {"prompt": PLANTS}, scorer=SCORER) == 1.0


def test_what_verl_asks_at_the_same_time_is_scored_in_one_batch_and_each_gets_its_own_reward():
    async def together():
        return await asyncio.gather(*(ask(GOOD if i % 2 else BAD) for i in range(16)))

    alone = [portal.run(ask(BAD)), portal.run(ask())]
    sizes = verl._batches(SCORER).sizes
    before = len(sizes)
    assert asyncio.run(together()) == alone * 8
    assert sizes[before:] == [16]


def test_an_error_is_of_the_answer_that_it_concerns_and_the_others_have_their_rewards():
    async def together():
        asked = (ask(), ask("  "), ask(extra_info={"prompt": ""}), ask())
        return await asyncio.gather(*asked, return_exceptions=True)

    good, empty, unasked, again = asyncio.run(together())
    assert (good, again) == (1.0, 1.0)
    assert "an answer has no reward: no text. Give such ones a number of yours" in str(empty)
    assert "extra_info['prompt']: the prompt is empty" in str(unasked)
    assert portal.run(ask("  ", missing=-1.0)) == -1.0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ask(extra_info={"index": 1}), "extra_info has no 'prompt' or 'question'"),
        (lambda: ask(extra_info={"index": 1}), "it has: 'index'. Put the prompt into the data's column extra_info"),
        (lambda: ask(extra_info={}), "it has: nothing"),
        (lambda: ask(prompt="asked"), "extra_info has no 'asked'"),
        (lambda: ask(scorer=None), "no scorer is named: '+reward.custom_reward_function.reward_kwargs.scorer="),
        (lambda: ask(scorer="flipp:mini"), "unknown scorer 'flipp'. Did you mean 'flip'?"),
        (
            lambda: ask(scorer="consensus"),
            "compares the answers to a prompt with each other, and here they come one by",
        ),
        (
            lambda: ask(scorer={"flip": "mini"}),
            "scorer must be the text of a spec, such as flip:Qwen/Qwen3-0.6B, not {",
        ),
        (lambda: ask(extra_info=PLANTS), "extra_info must be the row's own columns by their names, not 'Write a"),
        (lambda: ask(["a"]), "solution_str must be the text of a completion, not ['a']"),
        (lambda: ask("  ", missing="low"), "missing must be a number, got 'low'"),
    ],
)
def test_a_call_that_cannot_be_is_a_sentence(call, said):
    with pytest.raises(InputError) as refused:
        portal.run(call())
    assert said in str(refused.value)


def test_a_model_that_cannot_be_reached_is_an_error_and_no_reward():
    with pytest.raises(EngineError):
        portal.run(ask(scorer='flip:"http://127.0.0.1:9/v1,model=m,retries=0"'))


def test_a_right_answer_and_the_rows_columns_reach_the_scorer():
    task = verl._task("gsm8k", 42, {"prompt": PLANTS, "index": 7}, None)
    assert (task.reference, task.metadata["index"], task.metadata["data_source"]) == ("42", 7, "gsm8k")


def test_answers_to_one_prompt_are_rated_with_the_columns_of_their_own_rows():
    """Those asked together were rated with the columns of the first."""
    asked = [("a", "a"), ("a", "b"), ("b", "b")]  # an answer, and the right one of its row
    batches = Batches(Own(lambda each: float(each.candidate.text == each.task.metadata["right"])))

    async def together():
        tasks = [(replace(Task.of(PLANTS), metadata={"right": right}), text) for text, right in asked]
        return await asyncio.gather(*(batches.rate(*each) for each in tasks))

    assert [score.reward for score in asyncio.run(together())] == [1.0, 0.0, 1.0]
    assert batches.sizes == [3]


# --- with verl --------------------------------------------------------------------------------------------------------


@pytest.fixture
def real():
    pytest.importorskip("verl", reason="pip install --no-deps verl, and what it imports: .ci/run")
    from omegaconf import OmegaConf

    def config(path, name="compute_score", **options):
        function = {"path": path, "name": name, "reward_kwargs": {"scorer": SCORER, **options}}
        manager = {"source": "register", "name": "naive"}
        return OmegaConf.create({"reward": {"custom_reward_function": function, "reward_manager": manager}})

    return config


@pytest.mark.verl
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", ["pkg://bon.integrations.verl", str(Path(verl.__file__))])
def test_verls_loader_finds_the_function_and_sees_that_it_is_awaited(real, path):
    from verl.trainer.ppo.reward import get_custom_reward_fn

    function = get_custom_reward_fn(real(path))
    assert inspect.iscoroutinefunction(function)
    reward = function(data_source="mini", solution_str=GOOD, ground_truth="", extra_info={"prompt": PLANTS})
    assert asyncio.run(reward) == 1.0
    blocking = get_custom_reward_fn(real(path, "compute_score_blocking"))
    assert not inspect.iscoroutinefunction(blocking)
    assert blocking(data_source="mini", solution_str=GOOD, ground_truth="", extra_info={"prompt": PLANTS}) == 1.0


@pytest.mark.verl
@pytest.mark.filterwarnings("ignore")
def test_verls_reward_manager_scores_a_batch_of_its_own_rows_at_once(real):
    import numpy as np
    import torch
    from transformers import AutoTokenizer
    from verl import DataProto
    from verl.trainer.ppo.reward import load_reward_manager

    from bon.mini import WEIGHTS

    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    answers = [GOOD, BAD, GOOD]
    ids = [tokenizer(text)["input_ids"] for text in answers]
    longest = max(map(len, ids))
    padded = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    ones = torch.ones_like(padded[:, :1])
    columns = {
        "data_source": ["mini"] * 3,
        "reward_model": [{"ground_truth": ""}] * 3,
        "extra_info": [{"prompt": np.array([{"role": "user", "content": PLANTS}])} for _ in answers],
    }
    data = DataProto.from_dict(
        {"prompts": ones, "responses": padded, "attention_mask": torch.cat([ones, mask], 1)},
        {name: np.array(values, dtype=object) for name, values in columns.items()},
    )
    manager = load_reward_manager(real("pkg://bon.integrations.verl"), tokenizer)
    sizes = verl._batches(SCORER).sizes
    before = len(sizes)

    async def scored():
        return await asyncio.gather(*(manager.run_single(data[i : i + 1]) for i in range(3)))

    rewards = [found["reward_score"] for found in manager.loop.run_until_complete(scored())]
    assert rewards == [portal.run(ask(text)) for text in answers]
    assert sizes[before] == 3
