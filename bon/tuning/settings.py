"""The settings of a training, checked where they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from bon.errors import InputError, whole_number


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How an adapter is trained.

    Args:
        style: prompt style of the scorer, as in ``BackwardLikelihood``.
        epochs: how often each pair is read.
        learning_rate: its peak; it rises over the first twentieth of the steps and falls to 0 as a cosine.
        weight_decay: of AdamW.
        rank: rows of the adapter's matrices; alpha is twice that.
        dropout: share of the adapter's inputs that are left out.
        batch: pairs of a step.
        contrast: weight of the contrast, InfoNCE over mean log p(instruction | response) with other instructions; 0
            leaves it out.
        rivals: how many other instructions each response is rated with: the pair's negatives, then the batch's.
        temperature: of the contrast, in nats.
        max_tokens: tokens of one pass with padding, which bounds the memory; longer pairs are left out. None takes
            1,024 on a CPU and 8,192 on a GPU.
        checkpoint_s: seconds between two checkpoints.
        seed: of the initial weights, the order and the dropout.

    Raises:
        InputError: a value that cannot be.
    """

    style: str = "direct"
    epochs: int = 1
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    rank: int = 16
    dropout: float = 0.0
    batch: int = 16
    contrast: float = 0.0
    rivals: int = 3
    temperature: float = 0.2
    max_tokens: int | None = None
    checkpoint_s: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "rank", "batch", "rivals"):
            whole_number(name, getattr(self, name), 1)
        if whole_number("seed", self.seed, 0) >= 1 << 63:
            raise InputError(f"seed must be below 2 to the power of 63, got {self.seed}.")
        if self.max_tokens is not None:
            whole_number("max_tokens", self.max_tokens, 16)
        for field in fields(self):
            value = getattr(self, field.name)
            positive = field.name in ("learning_rate", "temperature")
            if isinstance(value, float) and not ((value > 0 if positive else value >= 0) and math.isfinite(value)):
                raise InputError(f"{field.name} must be a number {'above 0' if positive else 'of 0 or more'}: {value}.")
        if self.dropout >= 1:
            raise InputError(f"dropout must be below 1, got {self.dropout}.")
