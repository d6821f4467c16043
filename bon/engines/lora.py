"""LoRA adapters: a folder with small matrices that change a base model, W + scale * B A.

PEFT's format: ``adapter_config.json``, which names the base, and ``adapter_model.safetensors``. What is more than
matrices for linear layers (DoRA, whole modules, biases) is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bon.catalog import packaged
from bon.errors import InputError, ModelNotFoundError
from bon.mini import WEIGHTS as MINI
from bon.mini import shown_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RECORD = "bon.json"
"""What ``bon train flip`` writes beside an adapter: the fingerprint of its base, how it was made, what it brought."""


class Change(NamedTuple):
    """What an adapter adds to a linear layer: inputs @ down.T @ up.T.

    Args:
        module: the layer.
        down: shape (rank, numbers that go in).
        up: shape (numbers that come out, rank), scaled.
    """

    module: Any
    down: Any
    up: Any


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
            raise InputError(f"{self.folder / CONFIG} names no base: say base_model_name_or_path there.")
        return str(MINI) if base == shown_name(MINI) else base

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

    @property
    def record(self) -> dict[str, Any]:
        """What ``bon train flip`` wrote beside it; empty for adapters of others."""
        try:
            return dict(json.loads((self.folder / RECORD).read_text()))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{self.folder / RECORD} cannot be read: {error!r}.") from error

    @property
    def digest(self) -> str:
        """Changes with its weights."""
        return hashlib.blake2b(self._weights.read_bytes(), digest_size=6).hexdigest()

    @property
    def modules(self) -> set[str]:
        """The last names of the layers that it changes."""
        return {key.split(".")[-3] for key in self._tensors()}

    @property
    def _weights(self) -> Path:
        file = self.folder / WEIGHTS
        if not file.is_file():
            raise ModelNotFoundError(f"the LoRA adapter {str(self.folder)!r} has no {WEIGHTS}.")
        return file

    def _tensors(self) -> dict[str, Any]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(self._weights))
        except SafetensorError as error:
            raise InputError(f"the LoRA adapter {str(self.folder)!r} is damaged: {WEIGHTS} ({error}).") from error

    def check_base(self, model: str, fingerprint: str) -> None:
        """Raise an InputError where it is known to be of another base than ``model``, which has this fingerprint."""
        if self.record.get("fingerprint", fingerprint) != fingerprint:
            raise InputError(
                f"the LoRA adapter {str(self.folder)!r} was trained for {self.base!r}, and {model!r} is another model. "
                "Name that one, or train an adapter for this one: bon train flip"
            )

    def changes(self, model: Any) -> list[Change]:
        """What it adds to each linear layer of a transformers model, as float32 on the CPU.

        Raises:
            ModelNotFoundError: its weights are not there.
            InputError: it is of another kind, or does not fit the model.
        """
        name, weights = f"the LoRA adapter {str(self.folder)!r}", self._tensors()
        if self.config.get("peft_type") != "LORA" or self.config.get("use_dora"):
            raise InputError(f"{name} is of another kind (DoRA, say), which cannot be loaded.")
        found = []
        for key in [key for key in weights if key.endswith(".lora_A.weight")]:
            layer = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            down = weights.pop(key).float()
            up = weights.pop(key.replace(".lora_A.", ".lora_B."), down[:0]).float()
            try:
                module = model.get_submodule(layer)
                sizes = _sizes(module)
            except AttributeError as error:
                raise InputError(f"{name} does not fit {self.base!r}: {error}") from error
            if (len(up), down.shape[1]) != sizes or up.shape[1] != len(down):
                raise InputError(
                    f"{name} does not fit {self.base!r}: {layer} is {sizes} there, and the adapter's matrices are "
                    f"{tuple(up.shape)} and {tuple(down.shape)}."
                )
            found.append(Change(module, down, self._scale(layer, len(down)) * up))
        if weights:
            raise InputError(
                f"{name} holds more than matrices for linear layers ({min(weights)}). Merge it with PEFT "
                "(merge_and_unload) and name the merged folder."
            )
        return found

    def merge(self, model: Any) -> None:
        """Add the adapter to a transformers model's own weights; raises as ``changes``."""
        for module, down, up in self.changes(model):
            change = up @ down
            module.weight.data += (change if hasattr(module, "out_features") else change.T).to(module.weight)


def _sizes(module: Any) -> tuple[int, int]:
    """Numbers that come out of a linear layer, and that go in; GPT-2's has other names for them."""
    return (module.out_features, module.in_features) if hasattr(module, "out_features") else (module.nf, module.nx)


@contextmanager
def added(changes: list[Change]) -> Iterator[None]:
    """Let linear layers compute with an adapter, and then as before; their weights are not touched."""
    handles = [change.module.register_forward_hook(_hook(change)) for change in changes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(change: Change) -> Any:
    from torch.nn.functional import linear

    def add(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        return output + linear(linear(inputs[0], change.down), change.up)

    return add


def named_adapter(folder: str | Path) -> Adapter:
    """The adapter that a folder holds.

    Raises:
        ModelNotFoundError: it holds none.
        InputError: one that cannot be read.
    """
    adapter = adapter_of(folder)
    if adapter is None:
        raise ModelNotFoundError(
            f"there is no LoRA adapter in {str(folder)!r}: its folder has {CONFIG} and {WEIGHTS}. "
            "bon train flip makes one."
        )
    return adapter


def adapter_of(model: str | Path) -> Adapter | None:
    """The adapter that a folder holds, or one that comes with bon; None for whole models and other names.

    Raises:
        InputError: an adapter_config.json that cannot be read.
    """
    folder = Path(str(model)).expanduser()  # in a spec a folder named 3 is a number
    if not folder.is_dir():
        folder = packaged(str(model)) or folder
    if not (folder / CONFIG).is_file() or (folder / "config.json").is_file():
        return None
    try:
        config = json.loads((folder / CONFIG).read_text())
        adapter = Adapter(folder, {**config, "r": int(config["r"]), "lora_alpha": float(config["lora_alpha"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / CONFIG} cannot be read as a LoRA adapter's: {error!r}.") from error
    return adapter
