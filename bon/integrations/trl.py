"""Any scorer as a reward function of TRL's trainers (``GRPOTrainer``, ``RLOOTrainer``; TRL 1.16 or later).

    from bon.integrations.trl import reward

    GRPOTrainer(model, reward_funcs=reward("flip:Qwen/Qwen3-0.6B"), ...)

TRL is not imported here. The scorer's models are loaded once and do not change while the policy does.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bon.errors import InputError, number
from bon.group import Group
from bon.models import ModelPool
from bon.pipeline import score
from bon.task import Task
from bon.types import Score

log = logging.getLogger("bon")

TRLReward = Callable[..., Awaitable[list[float | None]]]

_OF_THE_TRAINER = frozenset({"completion_ids", "trainer_state", "log_extra", "log_metric", "environments"})
"""Keywords of TRL's that are no columns of the dataset."""
_REFERENCE = "reference"


def reward(
    scorer: Any,
    *,
    instruction: str | None = None,
    reference: str | None = None,
    missing: float | None = None,
    name: str | None = None,
    pool: ModelPool | None = None,
) -> TRLReward:
    """Return an async function with the signature of TRL's reward functions.

    The completions of one prompt that stand together in a call are one group, as a trainer on one process hands them
    out; all groups of a call are scored in one batch. With several processes a group may be divided among them, which
    changes the rewards of scorers that compare candidates (``consensus``, ``judge:...,style=pairwise``).

    A completion that has no reward (it has no text, or the scorer's answer could not be read) is None for TRL, which
    leaves it out of its group's mean and does not learn from it; a sentence in the log counts them. TRL's metrics have
    the shares of completions without a reward and of echoes, its table of completions what was inferred from each.

    Args:
        scorer: whatever ``BestOfN`` takes as one: a spec ("flip:Qwen/Qwen3-0.6B"), a ``Scorer``, a reward function. Its
            models are loaded now.
        instruction: the dataset's column with the part of the last user message that is the instruction.
        reference: the column with a right answer; None takes "reference" where there is one.
        missing: the reward of a completion that has none, in place of None.
        name: what TRL calls the reward in its metrics; the scorer's name by default.
        pool: where the models are loaded and stay; None frees them with the function.

    Returns:
        A function of ``prompts`` and ``completions``, texts or conversations, and of the dataset's columns, which are
        the metadata of the tasks. It raises what is wrong with its arguments (``InputError``), and what keeps a whole
        group from being scored (a model that cannot be reached), which ends the training.

    Raises:
        InputError: no such scorer, a model that cannot be loaded, or a scorer that needs what the policy alone knows.
    """
    own = ModelPool() if pool is None else pool
    ready = own.scorer(scorer)
    if ready.needs.logprobs and not ready.engines:
        raise InputError(
            f"{ready.name} needs the log-probabilities of the policy's samples, which a trainer does not hand out. "
            "forward:MODEL rates them with a model."
        )
    if missing is not None:
        number("missing", missing)
    called = name or ready.name
    named = {"instruction": instruction, _REFERENCE: reference}

    async def rewards(prompts: Any = None, completions: Any = None, **given: Any) -> list[float | None]:
        columns = {column: values for column, values in given.items() if column not in _OF_THE_TRAINER}
        _check_columns(called, {"prompts": prompts, "completions": completions, **columns}, named)
        if ready.needs.reference and reference is None and _REFERENCE not in columns:
            raise InputError(
                f"the reward {called!r} compares with a right answer, and the dataset has no column {_REFERENCE!r}. "
                f"It has: {_listed(columns)}. Name the one that holds it: reward(..., reference=COLUMN)."
            )
        rows = [{column: values[at] for column, values in columns.items()} for at in range(len(prompts))]
        texts = [_text(completion, at) for at, completion in enumerate(completions)]
        starts = [at for at in range(len(rows)) if not at or prompts[at] != prompts[at - 1] or rows[at] != rows[at - 1]]
        ends = [*starts[1:], len(rows)]
        tasks = [_task(prompts[at], rows[at], at, instruction, reference or _REFERENCE) for at in starts]
        pairs = [(task, texts[at:end]) for task, at, end in zip(tasks, starts, ends, strict=True)]
        found = [each for group in await score(ready, pairs, pool=own) for each in _scores(group)]
        _tell(called, found, given, missing)
        return [missing if each.reward is None else each.reward for each in found]

    rewards.__name__ = rewards.__qualname__ = called  # what TRL shows
    return rewards


def _check_columns(called: str, given: Mapping[str, Any], named: Mapping[str, str | None]) -> None:
    """Everything is there, and there is as much of it as there are prompts."""
    for what in ("prompts", "completions"):
        if not isinstance(given[what], Sequence) or isinstance(given[what], str):
            raise InputError(
                f"the reward {called!r} is called with prompts= and completions=, two lists of equal length; {what} is "
                f"{given[what]!r:.60}."
            )
    for option, column in named.items():
        if column is not None and column not in given:
            raise InputError(
                f"the reward {called!r} needs the column {column!r} ({option}=), and the dataset has none of that "
                f"name. It has: {_listed(given)}. A trainer that removes columns has remove_unused_columns=False."
            )
    for column, values in given.items():
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(given["prompts"]):
            length = len(values) if isinstance(values, Sequence) else type(values).__name__
            raise InputError(
                f"the reward {called!r} got {len(given['prompts'])} prompts and {length} {column}; it is called with "
                "a list of one each."
            )


def _listed(columns: Mapping[str, Any]) -> str:
    return ", ".join(repr(column) for column in columns if column not in ("prompts", "completions")) or "none"


def _text(completion: Any, at: int) -> str:
    """The answer of a completion: its text, or that of its last message where the assistant has the last word."""
    if isinstance(completion, str):
        return completion
    last = completion[-1] if isinstance(completion, Sequence) and completion else completion
    content = last.get("content", "") if isinstance(last, Mapping) and "role" in last else ()
    if isinstance(content, list):
        content = "".join(part.get("text", "") if isinstance(part, Mapping) else "" for part in content)
    if content is None or isinstance(content, str):
        return content or "" if last["role"] == "assistant" else ""
    raise InputError(
        f"completion {at} must be text or a list of messages with 'role' and 'content', not {completion!r:.80}."
    )


def _task(prompt: Any, row: Mapping[str, Any], at: int, instruction: str | None, reference: str) -> Task:
    try:
        task = Task.of(prompt, None if instruction is None else row[instruction])
    except (InputError, AttributeError) as error:
        raise InputError(f"prompt {at}: {error}") from error
    answer = row.get(reference)
    rest = {column: value for column, value in row.items() if column not in (instruction, reference)}
    return replace(task, reference=None if answer is None else str(answer), metadata=rest)


def _scores(group: Group) -> tuple[Score, ...]:
    """The scores of a group.

    Raises:
        BonError: why none of them has a reward, where that says nothing about the completions.
    """
    outage = next((each.error for each in group.scores if each.error is not None), None)
    if group.error is not None:
        raise group.error
    if outage is not None and all(each.reward is None for each in group.scores):
        raise outage
    return group.scores


def _tell(called: str, scores: Sequence[Score], given: Mapping[str, Any], missing: float | None) -> None:
    """Say which completions have no reward, in the log and in TRL's metrics."""
    without = [each for each in scores if each.reward is None]
    if "log_metric" in given:
        echoes = sum(each.status == "echo" for each in scores)
        given["log_metric"](f"{called}/without_reward", len(without) / max(1, len(scores)))
        given["log_metric"](f"{called}/echo", echoes / max(1, len(scores)))
    if "log_extra" in given:
        given["log_extra"](f"{called} inferred", [each.explanation for each in scores])
    if without:
        log.warning(
            "%s: %d of %d completions have no reward (%s). %s.",
            called,
            len(without),
            len(scores),
            without[0].reason or without[0].status,
            "The trainer does not learn from them; missing=NUMBER gives them one"
            if missing is None
            else f"They get {missing:g}",
        )
