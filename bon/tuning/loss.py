"""What training minimises: -log p(instruction | response) per token, and two contrasts.

One is with other instructions for the same response, one with a worse response for the same instruction.

All instructions that a response is rated with stand in one row behind it, none of them seeing another: the response,
which is most of the row, is read once.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bon.tuning.encoding import Encoded


def logprobs(model: Any, pairs: Sequence[Encoded]) -> list[Tensor]:
    """Sums of log p(token | tokens before it) over the targets of each pair, in nats, shape (targets,) each.

    Rows are padded in front, so that the logits that are needed are those of the last columns, and no others are made.

    Args:
        model: a causal language model of transformers, or PEFT's around one.
        pairs: token ids.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    width = max(pair.length for pair in pairs)
    keep = 1 + max(pair.length - len(pair.prompt) for pair in pairs)
    ids, positions = np.zeros((2, len(pairs), width), np.int64)
    which = np.full((len(pairs), width), -1)  # 0 is the prompt, 1 the first target, ...
    before = []  # for each row, the columns whose logits tell of its targets' tokens
    for row, pair in enumerate(pairs):
        start = width - pair.length
        end = start + len(pair.prompt)
        ids[row, start:] = [*pair.prompt, *(token for target in pair.targets for token in target)]
        which[row, start:] = np.repeat(range(len(pair.targets) + 1), [*map(len, (pair.prompt, *pair.targets))])
        positions[row, start:end] = range(len(pair.prompt))
        columns, last = [], end - 1
        for target in pair.targets:
            positions[row, end : end + len(target)] = range(len(pair.prompt), len(pair.prompt) + len(target))
            columns += [last, *range(end, end + len(target) - 1)]
            end += len(target)
        before.append(columns)
    inputs = {
        "attention_mask": _apart(which, model.dtype),
        "position_ids": torch.from_numpy(positions),
        "logits_to_keep": keep,
        "use_cache": False,
    }
    accepted = inspect.signature(inner.forward).parameters
    placed = {
        name: value.to(model.device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
        if name in accepted
    }
    given = torch.from_numpy(ids).to(model.device)
    logits = model(given, **placed).logits[:, -keep:]
    found = []
    for row, (pair, columns) in enumerate(zip(pairs, before, strict=True)):
        some = logits[row, torch.tensor(columns, device=model.device) - (width - keep)].float()
        tokens = given[row, width - pair.length + len(pair.prompt) :]
        each = some.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - some.logsumexp(-1)
        found.append(torch.stack([one.sum() for one in each.split([*map(len, pair.targets)])]))
    return found


def _apart(which: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
    """What is added to attention so that a token sees the prompt and its own part up to itself: (rows, 1, to, from)."""
    own, seen = which[:, :, None], which[:, None, :]
    # Padding sees padding, and nobody sees that: of a token that sees nothing, kernels of a GPU make no number.
    sees = (seen == 0) | (seen == own)
    sees &= np.tri(which.shape[1], dtype=bool)
    return torch.zeros(sees.shape, dtype=dtype).masked_fill_(~torch.from_numpy(sees), torch.finfo(dtype).min)[:, None]


def losses(model: Any, pairs: Sequence[Encoded], temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over pairs: of -log p(instruction | response), of the contrast, and of the preference.

    The contrast is InfoNCE (arXiv 1807.03748): the cross entropy of the own instruction among all that a response is
    rated with, by mean log p per token over the temperature. The preference is Bradley and Terry's: minus the log of
    the probability, a logistic function of the same mean's difference, that the response is ahead of the rejected one.

    Args:
        model: see ``logprobs``.
        pairs: with their rivals and rejected responses; without any, contrast and preference are 0.
        temperature: in nats.
    """
    own, contrast, preference = [], [], [torch.zeros((), device=model.device)]
    found = iter(logprobs(model, [row for pair in pairs for row in (pair, *pair.rejected)]))
    for pair in pairs:
        totals = next(found)
        lengths = torch.tensor([len(target) for target in pair.targets], device=totals.device)
        means = totals / lengths / temperature
        own.append(-totals[0])
        contrast.append(-means.log_softmax(0)[0])
        if pair.worse:
            preference.append(-logsigmoid(means[0] - next(found)[0] / lengths[0] / temperature))
    return torch.stack(own).sum(), torch.stack(contrast).sum(), torch.stack(preference).sum()
