"""Losses that learn a policy from the candidates of best-of-N: DPO, SELM and GDRO.

All take log-ratios, log p(y | x) under the policy less the same under what it was trained from, summed over the tokens
of the response, in nats. They return one loss for each pair or group, to be averaged.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """Direct preference optimisation, the sigmoid loss (arXiv 2305.18290, equation 7).

    Args:
        chosen, rejected: log-ratios, both of one shape, which is that of the loss.
        beta: strength of the tie to the reference.
    """
    return -logsigmoid(beta * (chosen - rejected))


def selm(chosen: Tensor, rejected: Tensor, own: Tensor, *, beta: float = 0.01, alpha: float = 1e-3) -> Tensor:
    """Self-exploring language models: DPO, and away from what the policy wrote already (arXiv 2405.19332).

    As in the authors' code (shenao-zhang/SELM, ``optimistic_dpo_loss``), which has these ``beta`` and ``alpha``. With
    ``alpha=0`` it is DPO.

    Args:
        chosen, rejected: log-ratios of the best and the worst response.
        own: log-ratios of the policy's own response (``reference_response`` in exported pairs).
        beta: as in ``dpo``.
        alpha: strength of the exploration.
    """
    return dpo(chosen, rejected, beta=beta) + alpha * beta * own


def gdro(ratios: Tensor, rewards: Tensor, *, beta: float = 0.1, tau: float = 0.05, gamma: float = 0.0) -> Tensor:
    """Group-level direct reward optimisation: a whole group is ranked by its rewards (arXiv 2601.02036).

    The candidates stand in the order of their rewards. From each place but the last on, those that are left share a
    softmax of s = beta * ratio, and its cross entropy with a softmax of reward / tau is added up. With two candidates
    and tau towards 0 it is DPO. The paper trains diffusion models, and its text was not at hand: the formula comes from
    a summary.

    Args:
        ratios, rewards: of shape (..., k), k candidates of a group each. Candidates without a reward are left out
            before.
        beta: as in ``dpo``.
        tau: in units of the reward: how far apart two rewards must be to count as different.
        gamma: weight of -log p of the best candidate, which keeps it likely.
    """
    order = rewards.argsort(dim=-1, descending=True, stable=True)
    ratios, target = ratios.gather(-1, order), rewards.gather(-1, order) / tau
    scores = beta * ratios
    loss = -gamma * ratios[..., 0]
    for first in range(scores.shape[-1] - 1):
        left = scores[..., first:]
        loss = loss + left.logsumexp(-1) - (target[..., first:].softmax(-1) * left).sum(-1)
    return loss
