"""LoRA adapters: a folder with small matrices that change a base model, W + scale * B A.

PEFT's format: ``adapter_config.json``, which names the base, and ``adapter_model.safetensors``. What is more than
matrices for linear layers (DoRA, whole modules, biases) is refused.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bon.errors import InputError, ModelNotFoundError

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter on disk.

    Args:
        folder: where it is.
        config: what its adapter_config.json says.
    """

    folder: Path
    config: dict[str, Any]

    @property
    def base(self) -> str:
        """The model that it changes.

        Raises:
            InputError: it names none.
        """
        base = self.config.get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise InputError(f"{self.folder / _CONFIG} names no base: say base_model_name_or_path there.")
        return base

    @property
    def tokenizer(self) -> str | None:
        """The folder of its own tokenizer, where it brings one: it was trained with that chat template."""
        return str(self.folder) if (self.folder / "tokenizer_config.json").is_file() else None

    @property
    def rank(self) -> int:
        """Rows of its largest matrices."""
        return max(int(self.config["r"]), *map(int, (self.config.get("rank_pattern") or {0: 0}).values()))

    def _scale(self, module: str, rank: int) -> float:
        patterns = self.config.get("alpha_pattern") or {}
        own = (alpha for name, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({name})", module))
        alpha = next(own, self.config["lora_alpha"])
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def merge(self, model: Any) -> None:
        """Add the adapter to a transformers model's own weights.

        Raises:
            ModelNotFoundError: its weights are not there.
            InputError: it is of another kind, or does not fit the model.
        """
        import torch
        from safetensors.torch import load_file

        name = f"the LoRA adapter {str(self.folder)!r}"
        file = self.folder / _WEIGHTS
        if not file.is_file():
            raise ModelNotFoundError(f"{name} has no {_WEIGHTS}.")
        weights = load_file(file)
        if self.config.get("peft_type") != "LORA" or self.config.get("use_dora"):
            raise InputError(f"{name} is of another kind (DoRA, say), which cannot be loaded.")
        for key in [key for key in weights if key.endswith(".lora_A.weight")]:
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            down = weights.pop(key).float()
            up = weights.pop(key.replace(".lora_A.", ".lora_B."), torch.empty(0, 0)).float()
            try:
                weight = model.get_submodule(module).weight.data
                change = self._scale(module, len(down)) * (up @ down)
                weight += (change.T if self.config.get("fan_in_fan_out") else change).to(weight)
            except (AttributeError, RuntimeError) as error:
                raise InputError(
                    f"the LoRA adapter {str(self.folder)!r} does not fit {self.base!r}: {error}"
                ) from error
        if weights:
            raise InputError(
                f"{name} holds more than matrices for linear layers ({min(weights)}). Merge it with PEFT "
                "(merge_and_unload) and name the merged folder."
            )


def adapter_of(model: str | Path) -> Adapter | None:
    """The adapter that a folder holds; None for whole models and for names.

    Raises:
        InputError: an adapter_config.json that cannot be read.
    """
    folder = Path(model).expanduser()
    if not (folder / _CONFIG).is_file() or (folder / "config.json").is_file():
        return None
    try:
        config = json.loads((folder / _CONFIG).read_text())
        adapter = Adapter(folder, {**config, "r": int(config["r"]), "lora_alpha": float(config["lora_alpha"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / _CONFIG} cannot be read as a LoRA adapter's: {error!r}.") from error
    return adapter
