"""The non-negative Bayesian head: a reward that is a sum of few factors, each with a spread of its own.

BNRM (arXiv 2602.10623, code: GuoweiRong/Bayesian-Non-negative-Reward-Model). Factors of a candidate and weights of
factors are Weibull variables with Gamma(1, 1) priors. There the language model is trained along with it and has 1024
factors; here it is a head on frozen hidden states, trained on pairs within a row in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bon.heads.data import Arrays, Labelled, Rewards, States, folds, scales

FACTORS, HIDDEN = 64, 64
STEPS = (10, 20, 50, 100)
"""How long it may be trained; which of them is chosen on left-out rows."""
KL_WEIGHT = 1e-5
_TOP = 5
_EULER = 0.5772156649015329
_LEAST, _MOST = 1e-6, 1e4
_RATE, _DECAY = 3e-3, 1e-2


class Factors(nn.Module):
    """Weibull means and shapes of a candidate's factors and of their weights.

    Args:
        width: of a hidden state.
        factors, hidden: how many factors, and how wide the two small networks are.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int, factors: int = FACTORS, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.factor_mean, self.factor_shape = (
            nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, factors)) for _ in range(2)
        )
        self.weight_mean = nn.Parameter(torch.ones(factors))
        self.weight_shape = nn.Parameter(torch.zeros(factors))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean and shape of the factors, shape (n, factors), and of their weights, shape (factors,)."""
        inputs = (states - self.mean) / self.scale
        means = (functional.relu(each).clamp(_LEAST, _MOST) for each in (self.factor_mean(inputs), self.weight_mean))
        shapes = (1 + functional.softplus(each) for each in (self.factor_shape(inputs), self.weight_shape))
        (factor, weight), (factor_shape, weight_shape) = means, shapes
        return factor, factor_shape, weight, weight_shape


def kl(mean: Tensor, shape: Tensor, scale: Tensor) -> Tensor:
    """KL divergence of Weibull(shape, scale), whose mean is this, from Gamma(1, 1), in nats."""
    return _EULER / shape - torch.log(scale) + torch.log(shape) + mean - _EULER - 1


def scale_of(mean: Tensor, shape: Tensor) -> Tensor:
    """The scale of a Weibull variable with this mean."""
    return mean / torch.exp(torch.lgamma(1 + 1 / shape))


def draw(shape: Tensor, scale: Tensor) -> Tensor:
    """One sample of each, through which gradients flow."""
    uniform = torch.rand_like(scale).clamp(1e-6, 1 - 1e-6)
    return scale * (-torch.log1p(-uniform)) ** (1 / shape)


def spread(mean: Tensor, shape: Tensor, weight: Tensor, weight_shape: Tensor) -> Tensor:
    """Standard deviation of the sum of factors times weights, all of them independent."""

    def second(mean: Tensor, shape: Tensor) -> Tensor:
        return scale_of(mean, shape) ** 2 * torch.exp(torch.lgamma(1 + 2 / shape))

    variance = second(mean, shape) * second(weight, weight_shape) - (mean * weight) ** 2
    return variance.clamp(min=0).sum(-1).sqrt()


def choose(data: Labelled, seed: int) -> dict[str, Any]:
    """How long to train: what puts most pairs of left-out rows in order."""
    found = dict.fromkeys(STEPS, 0.0)
    for part in folds(data.names, min(4, len(data.names)), seed):
        out = data.of(part)

        def note(head: Factors, step: int, out: Labelled = out) -> None:
            found[step] += float(out.in_order(_rewards(head, out.states).mean).sum())

        _train(data.of(np.setdiff1d(data.names, part)), max(STEPS), seed, note)
    return {"layers": [], "steps": max(found, key=lambda step: found[step])}


def fit(data: Labelled, settings: Mapping[str, Any], seed: int) -> Arrays:
    """The trained head's arrays."""
    head = _train(data, settings["steps"], seed)
    return {name: value.numpy() for name, value in head.state_dict().items()}


def rewards(arrays: Arrays, settings: Mapping[str, Any], states: States) -> Rewards:
    """Mean rewards, their spread and the factors that make most of each."""
    factors, hidden = arrays["factor_mean.2.weight"].shape
    head = Factors(len(arrays["mean"]), factors, hidden)
    head.load_state_dict({name: torch.from_numpy(np.array(value, np.float32)) for name, value in arrays.items()})
    return _rewards(head, states)


def _rewards(head: Factors, states: States) -> Rewards:
    with torch.no_grad():
        factor, shape, weight, weight_shape = head(torch.from_numpy(states.last).float())
        made = factor * weight
        top = made.topk(min(_TOP, made.shape[1]))
        factors = [
            tuple(zip(at, value, strict=True))
            for at, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
        means = made.double().sum(1).numpy()
        return Rewards(means, spread(factor, shape, weight, weight_shape).double().numpy(), factors)


def _train(data: Labelled, steps: int, seed: int, note: Any = None) -> Factors:
    """Bradley-Terry on the pairs of each row, with sampled factors and weights."""
    states = torch.from_numpy(data.states.last).float()
    better, worse, weights = (torch.from_numpy(each) for each in data.pairs())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = Factors(states.shape[1])
        for buffer, known in zip((head.mean, head.scale), scales(data.states.last), strict=True):
            buffer.copy_(torch.from_numpy(known))
        optimiser = torch.optim.AdamW(head.parameters(), lr=_RATE, weight_decay=_DECAY, fused=True)
        for step in range(1, steps + 1):
            factor, shape, weight, weight_shape = head(states)
            scale, weight_scale = scale_of(factor, shape), scale_of(weight, weight_shape)
            made = draw(shape, scale) @ draw(weight_shape, weight_scale)
            loss = -(functional.logsigmoid(made[better] - made[worse]) * weights).sum() / weights.sum()
            divergence = kl(factor, shape, scale).sum(-1).mean() + kl(weight, weight_shape, weight_scale).sum()
            optimiser.zero_grad()
            (loss + KL_WEIGHT * divergence).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            if note is not None and step in STEPS:
                note(head, step)
    return head
