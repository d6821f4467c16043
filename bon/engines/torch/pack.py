"""Weights in the layout in which a CPU multiplies them fastest.

torch's own product reads a weight as it is stored and lays it out again in every call, which for the few rows of a
decode step takes a third of the time or more. oneDNN can keep its layout. The weight is moved, not copied, except where
the input embedding is the same tensor. A single row is slower by a tenth or so, more rows are faster by up to a half.
It changes sums by rounding only.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor, nn

from bon.engines.memory import give_back

_LEAST = 1 << 19  # numbers in a weight; below, what a call costs beyond torch's (45 µs) is not made up for
_ROWS = 32  # any number above 1 gives the same layout


class PackedLinear(nn.Module):
    """A linear layer whose weight is kept in oneDNN's layout.

    Args:
        linear: float32 or bfloat16, on a CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)

    def forward(self, inputs: Tensor) -> Tensor:
        """The product of ``nn.Linear``."""
        made: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._weight, self._bias, "none", [], "")
        return made


def pack(model: Any) -> None:
    """Replace the large linear layers of a model on an x86 CPU; leaves every other model as it is."""
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    if not known or platform.machine() not in ("x86_64", "AMD64"):
        return
    # No list of the layers themselves: each weight goes as soon as it is packed, and the next takes its place.
    for parent in [module for module in model.modules() if not isinstance(module, nn.Linear)]:
        for name in [name for name, child in parent.named_children() if type(child) is nn.Linear]:
            if _pays(getattr(parent, name).weight):
                setattr(parent, name, PackedLinear(getattr(parent, name)))
    give_back()


def _pays(weight: Tensor) -> bool:
    known = {torch.float32, torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else {torch.float32}
    return weight.device.type == "cpu" and weight.dtype in known and weight.numel() >= _LEAST
