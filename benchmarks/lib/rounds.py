"""One round of training: a policy learns from its own scored candidates, by one of several methods.

All weights are trained, at a constant learning rate, with AdamW and without weight decay. GRPO, DPO and SFT are TRL's
trainers; SELM and GDRO, which TRL does not have, are a loop of a screen around ``bon.integrations.losses``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bon.data.export import SFT, Export, Groups, Pairs
from bon.engines.base import Prompt
from bon.engines.loading import load
from bon.engines.text.render import Renderer
from bon.engines.torch.reading import in_batches
from bon.errors import InputError, MissingExtraError
from bon.integrations.losses import gdro, selm
from bon.models import Model, weights_of
from bon.task import Task
from bon.tuning.encoding import Encoded, steps
from bon.tuning.loss import logprobs
from bon.types import Result

Rows = Sequence[Mapping[str, Any]]
_LOADING = ("device", "dtype", "revision", "trust_remote_code")
_PASS_TOKENS = 8192  # read at once, padding included
_CLIP = 1.0  # norm of the gradient, as in TRL


@dataclass(frozen=True, kw_only=True)
class Round:
    """How a round is trained.

    Args:
        policy: what is trained, a spec; it stays as it is.
        out: folder of the trained model.
        learning_rate: of all steps.
        batch: pairs, answers or groups of a step; prompts of a step of GRPO.
        epochs: how often each row is read.
        beta: the tie to the policy of before, of DPO, SELM and GDRO.
        alpha: SELM's exploration.
        tau: GDRO's temperature, in units of the reward.
        seed: of the order.
    """

    policy: str
    out: Path
    learning_rate: float = 1e-4
    batch: int = 16
    epochs: int = 1
    beta: float = 0.1
    alpha: float = 1e-3
    tau: float = 0.05
    seed: int = 0

    def loaded(self) -> tuple[Any, Any]:
        """The policy's model and tokenizer, for transformers."""
        model = Model.of(self.policy)
        return load(weights_of(model), **{name: model.options[name] for name in _LOADING if name in model.options})


@dataclass(frozen=True)
class Method:
    """A way to learn from results: what is exported, and what learns from it."""

    export: Callable[[Round], Export]
    train: Callable[[Rows, Round], None]

    def __call__(self, results: Iterable[Result], how: Round) -> Rows:
        """Train; returns what was learnt from.

        Raises:
            InputError: nothing is left to learn from.
            MissingExtraError: TRL is not installed.
        """
        export = self.export(how)
        rows = [row for result in results for row in export(result)]
        if not rows:
            reasons = ", ".join(f"{count} {what}" for what, count in export.refused.items() if count)
            raise InputError(f"there is nothing to learn from: {reasons or 'no results'}.")
        self.train(rows, how)
        return rows


def grpo(rows: Rows, rewards: Sequence[Callable[..., Any]], how: Round, *, n: int, **options: Any) -> list[Any]:
    """Train on n samples of each prompt that are made on the way; each prompt once, ``how.batch`` of them a step.

    A checkpoint every 50 steps lets a run that was broken off go on.

    Args:
        rows: with ``prompt`` and the columns that rewards need.
        rewards: reward functions of TRL's signature.
        how: see ``Round``.
        n: samples of a prompt.
        options: of ``GRPOConfig``.

    Returns:
        What TRL logged of each step.
    """
    from transformers.trainer_utils import get_last_checkpoint

    options = {"num_generations": n, "beta": 0.0, "logging_strategy": "steps", "logging_steps": 1, **options}
    kept = {"save_strategy": "steps", "save_steps": 50, "save_total_limit": 1, "max_steps": len(rows) // how.batch}
    trainer = _trainer(
        "GRPO", rows, how, per_device_train_batch_size=how.batch * n, reward_funcs=[*rewards], **kept, **options
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(how.out) if how.out.is_dir() else None)
    _save(trainer.model, trainer.processing_class, how)
    return [step for step in trainer.state.log_history if "reward" in step]


def _by_trl(kind: str, *columns: str, **fixed: str) -> Callable[[Rows, Round], None]:
    """Training by TRL's trainer of that name on some columns; ``fixed`` are options that a ``Round`` has."""

    def train(rows: Rows, how: Round) -> None:
        options = {option: getattr(how, name) for option, name in fixed.items()}
        rows = [{name: row[name] for name in columns} for row in rows]
        trainer = _trainer(kind, rows, how, per_device_train_batch_size=how.batch, **options)
        trainer.train()
        _save(trainer.model, trainer.processing_class, how)

    return train


def _trainer(kind: str, rows: Rows, how: Round, **options: Any) -> Any:
    try:
        import trl
    except ModuleNotFoundError as error:
        raise MissingExtraError("TRL, which trains,", "pip install 'bon[trl]'") from error
    from datasets import Dataset
    from transformers import PrinterCallback

    config, trainer = getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")
    own = {name: options.pop(name) for name in [*options] if name in inspect.signature(trainer.__init__).parameters}
    model, tokenizer = how.loaded()
    settings = {
        "output_dir": str(how.out),
        "num_train_epochs": how.epochs,
        "learning_rate": how.learning_rate,
        "lr_scheduler_type": "constant",
        "seed": how.seed,
        "use_cpu": model.device.type == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": model.device.type != "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    made = trainer(
        model, args=config(**settings), train_dataset=Dataset.from_list([*rows]), processing_class=tokenizer, **own
    )
    made.remove_callback(PrinterCallback)  # standard output is the report's
    return made


def _selm(rows: Rows, how: Round) -> None:
    def read(row: Mapping[str, Any]) -> list[tuple[str, bool]]:
        return [(_said(row["chosen"]), True), (_said(row["rejected"]), True), (row["reference_response"], True)]

    def loss(ratios: Tensor, row: Mapping[str, Any]) -> Tensor:
        return selm(*ratios, beta=how.beta, alpha=how.alpha)

    _learn(rows, how, read, loss)


def _gdro(rows: Rows, how: Round) -> None:
    def read(row: Mapping[str, Any]) -> list[tuple[str, bool]]:
        ends = [reason != "length" for reason in row["finish_reasons"]]
        return list(zip(map(_said, row["completions"]), ends, strict=True))

    def loss(ratios: Tensor, row: Mapping[str, Any]) -> Tensor:
        rewards = torch.tensor(row["rewards"], device=ratios.device)
        return gdro(ratios, rewards, beta=how.beta, tau=how.tau)

    _learn(rows, how, read, loss)


def _learn(
    rows: Rows,
    how: Round,
    read: Callable[[Mapping[str, Any]], Sequence[tuple[str, bool]]],
    loss: Callable[[Tensor, Mapping[str, Any]], Tensor],
) -> None:
    """Minimise a loss of each row's log-ratios.

    The answers to a prompt stand behind it in one row, none of them seeing another.

    Args:
        rows: with ``prompt``.
        how: see ``Round``.
        read: the answers of a row, and whether each came to its end.
        loss: of the log-ratios of these, in their order, and the row.
    """
    model, tokenizer = how.loaded()
    renderer = Renderer(tokenizer)
    end = () if renderer.end_id is None else (renderer.end_id,)
    encoded = [
        Encoded(
            renderer.render(Prompt.of(Task.of(row["prompt"]).asked)),
            tuple((*renderer.encode(text), *(end if ended else ())) for text, ended in read(row)),
        )
        for row in rows
    ]
    before: dict[int, Tensor] = {}
    with torch.no_grad():
        for some in _passes(encoded, range(len(rows))):
            before.update(zip(some, logprobs(model, [encoded[at] for at in some]), strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.learning_rate, weight_decay=0.0)
    for step in steps([row.length for row in encoded], how.batch, how.epochs, how.seed):
        for some in _passes(encoded, step):
            now = logprobs(model, [encoded[at] for at in some])
            losses = [loss(own - before[at], rows[at]) for at, own in zip(some, now, strict=True)]
            (torch.stack(losses).sum() / len(step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()
        optimizer.zero_grad()
    _save(model, tokenizer, how)


def _passes(encoded: Sequence[Encoded], some: Iterable[int]) -> Iterable[list[int]]:
    return in_batches({at: (0,) * encoded[at].length for at in some}, _PASS_TOKENS)


def _said(answer: Sequence[Mapping[str, Any]]) -> str:
    return str(answer[-1]["content"] or "")


def _save(model: Any, tokenizer: Any, how: Round) -> None:
    tokenizer.save_pretrained(how.out)
    model.save_pretrained(how.out)


METHODS = {
    "SFT": Method(lambda how: SFT(), _by_trl("SFT", "prompt", "completion")),
    "DPO": Method(
        lambda how: Pairs(drop_ties=True, seed=how.seed), _by_trl("DPO", "prompt", "chosen", "rejected", beta="beta")
    ),
    "DPO-loop": Method(
        lambda how: Pairs(drop_ties=True, reference_response=True, seed=how.seed),
        lambda rows, how: _selm(rows, replace(how, alpha=0.0)),
    ),
    "SELM": Method(lambda how: Pairs(drop_ties=True, reference_response=True, seed=how.seed), _selm),
    "GDRO": Method(lambda how: Groups(drop_ties=True, tau=how.tau), _gdro),
}
"""By name; each learns from the results of one best-of-N run.

``DPO-loop`` is SELM without exploration, so DPO in the loop that SELM and GDRO have. TRL counts what a chat template
puts behind the end of a turn (a line break, mostly) to the answer, and the loop does not.
"""
