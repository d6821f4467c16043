"""What training minimises: -log p(instruction | response) per token, and the contrast with other instructions."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bon.tuning.encoding import Encoded


def logprobs(model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
    """Sum of log p(token | tokens before it) over each target, in nats, shape (rows,).

    Rows are padded in front, so that the logits that are needed are those of the last columns, and no others are made.

    Args:
        model: a causal language model of transformers, or PEFT's around one.
        rows: token ids of a prompt, and of what is rated behind it.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    width = max(len(prompt) + len(target) for prompt, target in rows)
    longest = max(len(target) for _, target in rows)
    gaps = [width - len(prompt) - len(target) for prompt, target in rows]
    whole = [[0] * gap + [*prompt, *target] for gap, (prompt, target) in zip(gaps, rows, strict=True)]
    ids = torch.tensor(whole, device=model.device)
    positions = torch.arange(width - 1, device=model.device) - torch.tensor(gaps, device=model.device).unsqueeze(1)
    inputs = {
        "attention_mask": (positions >= 0).long() if any(gaps) else None,
        "position_ids": positions.clamp(min=0),
        "logits_to_keep": longest,
        "use_cache": False,
    }
    accepted = inspect.signature(inner.forward).parameters
    logits = model(ids[:, :-1], **{name: value for name, value in inputs.items() if name in accepted}).logits
    logits = logits[:, -longest:].float()
    found = logits.gather(-1, ids[:, -longest:].unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
    lengths = torch.tensor([len(target) for _, target in rows], device=model.device)
    counts = torch.arange(longest, device=model.device) >= longest - lengths.unsqueeze(1)
    totals: Tensor = (found * counts).sum(1)
    return totals


def parts(model: Any, pairs: Sequence[Encoded], temperature: float) -> tuple[Tensor, Tensor]:
    """Sums over pairs: of -log p(instruction | response), and of the contrast.

    The contrast is InfoNCE (arXiv 1807.03748): the cross entropy of the own instruction among all that a response is
    rated with, by mean log p per token over the temperature.

    Args:
        model: see ``logprobs``.
        pairs: with their rivals; without any the contrast is 0.
        temperature: in nats.
    """
    rated = logprobs(model, [(pair.prompt, target) for pair in pairs for target in pair.targets])
    own, contrast = [], []
    at = 0
    for pair in pairs:
        totals = rated[at : at + len(pair.targets)]
        at += len(pair.targets)
        means = totals / torch.tensor([len(target) for target in pair.targets], device=totals.device)
        own.append(-totals[0])
        contrast.append(-(means / temperature).log_softmax(0)[0])
    return torch.stack(own).sum(), torch.stack(contrast).sum()
