"""A scorer as verl's custom reward function.

    python -m verl.trainer.main_ppo reward.custom_reward_function.path=pkg://bon.integrations.verl \\
        '+reward.custom_reward_function.reward_kwargs.scorer="flip:Qwen/Qwen3-0.6B"' ...

verl calls it once for each completion. Its reward manager ``naive`` does so for many at the same time, and those are
scored in one batch. Nothing here imports verl.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from bon import portal
from bon.errors import InputError, number
from bon.integrations.batches import Batches, reward_of
from bon.task import Task

PROMPTS = ("prompt", "question")
"""Keys of ``extra_info`` that hold the prompt, where none is named."""

_batches = cache(Batches)  # one of each scorer


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any = None,
    extra_info: Mapping[str, Any] | None = None,
    *,
    scorer: str | None = None,
    prompt: str | None = None,
    missing: float | None = None,
    reward_router_address: str | None = None,
    reward_model_tokenizer: Any = None,
) -> float:
    """The reward of a completion.

    Args:
        data_source: the data set; a scorer finds it in the task's metadata.
        solution_str: the completion.
        ground_truth: a right answer, which becomes the task's reference.
        extra_info: the row's own columns, which hold the prompt, text or messages, and are the task's metadata.
        scorer: its spec; one that rates each answer by itself.
        prompt: the key of the prompt in ``extra_info``; by default the first of ``PROMPTS`` that is there.
        missing: the reward of a completion that has none (it is empty, say); None raises an error.
        reward_router_address, reward_model_tokenizer: verl's own reward model, which is not used.

    Raises:
        InputError: no scorer is named, there is no prompt, or the completion has no reward.
        EngineError: the scorer's model failed, or cannot be reached.
    """
    if not isinstance(scorer, str | None):
        raise InputError(f"scorer must be the text of a spec, such as flip:Qwen/Qwen3-0.6B, not {scorer!r:.60}.")
    if not isinstance(extra_info, Mapping | None):
        raise InputError(f"extra_info must be the row's own columns by their names, not {extra_info!r:.60}.")
    if scorer is None:
        raise InputError(
            "no scorer is named: '+reward.custom_reward_function.reward_kwargs.scorer=\"flip:Qwen/Qwen3-0.6B\"'."
        )
    if not isinstance(solution_str, str):
        raise InputError(f"solution_str must be the text of a completion, not {solution_str!r:.60}.")
    task = _task(data_source, ground_truth, extra_info or {}, prompt)
    rated = await _batches(scorer).rate(task, solution_str)
    if rated.reward is None and missing is not None:
        return number("missing", missing)
    return reward_of(rated, "Give such ones a number of yours: +reward.custom_reward_function.reward_kwargs.missing=0.")


def compute_score_blocking(*args: Any, **options: Any) -> float:
    """The same for verl's reward managers that cannot await (``remote``): name it as the function's ``name``."""
    return portal.run(compute_score(*args, **options))


def _task(data_source: str, ground_truth: Any, extra_info: Mapping[str, Any], key: str | None) -> Task:
    names = PROMPTS if key is None else (key,)
    name = next((name for name in names if extra_info.get(name) is not None), None)
    if name is None:
        wanted, known = " or ".join(map(repr, names)), ", ".join(map(repr, extra_info)) or "nothing"
        raise InputError(
            f"extra_info has no {wanted}, and verl hands over no other prompt; it has: {known}. Put the prompt into "
            "the data's column extra_info, or name its key: +reward.custom_reward_function.reward_kwargs.prompt=KEY."
        )
    asked = extra_info[name]
    if hasattr(asked, "tolist"):  # Parquet's lists come as arrays
        asked = asked.tolist()
    try:
        task = Task.of(asked)
    except InputError as error:
        raise InputError(f"extra_info[{name!r}]: {error}") from error
    reference = None if ground_truth is None else str(ground_truth)
    return replace(task, reference=reference, metadata={**extra_info, "data_source": data_source})
