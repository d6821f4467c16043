"""The training loop: a LoRA adapter by PEFT and AdamW, which goes on where it was broken off, with the same result.

What happens in a step depends on its number and the state before it only: the order of the pairs, the choice of rivals
and the dropout are drawn anew from the seed and the number. It runs on one device and in one process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import safetensors.torch
import torch

from bon.engines.loading import load
from bon.engines.lora import CONFIG, RECORD, WEIGHTS
from bon.engines.memory import give_back
from bon.engines.text.render import Renderer
from bon.engines.torch.engine import context_of, torch_errors
from bon.engines.torch.reading import fingerprint
from bon.engines.torch.threads import choose_threads
from bon.errors import EngineError, InputError, MissingExtraError
from bon.models import Model
from bon.scorers.likelihood import BackwardLikelihood
from bon.tuning import checkpoint
from bon.tuning.encoding import encode, passes, steps, with_rivals
from bon.tuning.loss import losses
from bon.tuning.pairs import LEAST_PAIRS, Pair
from bon.tuning.settings import Settings

log = logging.getLogger("bon")

_LOADING = ("device", "dtype", "revision", "trust_remote_code")
_TEMPLATE = ("chat_template", "chat_template_kwargs")
_PASS_TOKENS = {"cpu": 1024, "cuda": 8192}
_CLIP = 1.0  # norm of the gradient
PLOT = "loss.png"
_RISE = 0.05  # share of the steps over which the learning rate rises

Progress = Callable[[int, int, float], object]
"""Told which step is done, of how many, and its loss."""


class Training:
    """One adapter in the making.

    Args:
        model: the base.
        weights: its folder or name, for transformers.
        pairs: what is trained on.
        out: folder of the adapter; a checkpoint in it is gone on with.
        settings: how.
        threads: of the arithmetic on a CPU; None follows the rule of ``bon.engines.torch.threads``.

    Attributes:
        left_out: pairs that are longer than a pass or than the model reads, or whose response is nothing but thinking.
        losses: of each step so far: nats per token of the instructions, and the contrast where there is one.

    Raises:
        InputError: too few pairs, a folder that holds a finished adapter, a checkpoint of another training.
        MissingExtraError: PEFT is not installed.
    """

    def __init__(
        self,
        model: Model,
        weights: str,
        pairs: Sequence[Pair],
        out: Path,
        settings: Settings,
        threads: int | None = None,
    ) -> None:
        self.settings, self.out, self._base = settings, out, model
        if (out / CONFIG).exists() and not (out / checkpoint.NAME).exists():
            raise InputError(f"the folder {str(out)!r} holds an adapter already. Name another, or remove it.")
        options = {name: model.options[name] for name in _LOADING if name in model.options}
        loaded, tokenizer = load(weights, **options)
        if loaded.device.type == "cpu":
            torch.set_num_threads(threads or choose_threads())
        renderer = Renderer(tokenizer, **{name: model.options[name] for name in _TEMPLATE if name in model.options})
        self.fingerprint = fingerprint(loaded, renderer.fingerprint)
        self._most = settings.max_tokens or _PASS_TOKENS.get(loaded.device.type, _PASS_TOKENS["cuda"])
        scorer = BackwardLikelihood(style=settings.style)
        self._rivals = settings.rivals if settings.contrast else 0
        encoded = [encode(pair, scorer, renderer, self._rivals) for pair in pairs]
        room = context_of(loaded.config, None) or math.inf
        self._pairs = [
            pair
            for pair in encoded
            if pair is not None
            and pair.length <= self._most
            and len(pair.prompt) + max(map(len, pair.targets)) <= room  # as the scorer, which refuses a longer one
        ]
        self.left_out = len(pairs) - len(self._pairs)
        if len(self._pairs) < LEAST_PAIRS:
            raise InputError(
                f"{self.left_out} of {len(pairs)} pairs have more than {min(self._most, room)} tokens or an empty "
                "response, so nothing is left to train on. "
                + ("Raise max_tokens (--pass-tokens)." if self._most < room else "The model reads no longer ones.")
            )
        self._steps = steps([pair.length for pair in self._pairs], settings.batch, settings.epochs, settings.seed)
        with torch_errors(model.name, f"rank (now {settings.rank})"):
            self._model = _with_adapter(loaded, model.name, settings)
        self._weights = {name: weight for name, weight in self._model.named_parameters() if weight.requires_grad}
        self._optimizer: Any = torch.optim.AdamW(
            self._weights.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self._done = 0
        self.losses: list[tuple[float, float]] = []
        self._key = self._describe(pairs)
        self._resume()

    def run(self, progress: Progress = lambda done, of, loss: None) -> None:
        """Train to the end and write the adapter; the checkpoint stays until ``finish``.

        Raises:
            EngineError: the loss is no number. The adapter as it was at the last checkpoint is written.
            InputError: the folder cannot be written, holds something else, or another training writes to it.
        """
        saved = time.monotonic()
        self._model.train()
        with (
            checkpoint.claimed(self.out, (CONFIG, WEIGHTS, RECORD, PLOT)),
            torch_errors(self._base.name, f"max_tokens (now {self._most})"),
        ):
            while self._done < len(self._steps):
                loss = self._gradients()
                if time.monotonic() - saved >= self.settings.checkpoint_s:
                    self._checkpoint()  # of weights whose loss has just been seen to be a number
                    saved = time.monotonic()
                self._optimizer.step()
                self._optimizer.zero_grad()
                self.losses.append(loss)
                self._done += 1
                progress(self._done, len(self._steps), loss[0])
            if not all(bool(weight.isfinite().all()) for weight in self._weights.values()):
                self._fail()
            self._checkpoint()
            self._write_adapter()
        self._model = self._optimizer = None  # the memory is needed for what measures the adapter
        self._weights.clear()
        give_back()
        torch.cuda.empty_cache()

    def finish(self, record: dict[str, Any]) -> dict[str, Any]:
        """Write what is known of the adapter beside it, remove the checkpoint, and return what was written."""
        whole = self.write_record(record)
        (self.out / checkpoint.NAME).unlink(missing_ok=True)
        return whole

    def _gradients(self) -> tuple[float, float]:
        """The gradients of the next step, and its losses."""
        settings, number = self.settings, self._done
        torch.manual_seed(int(np.random.default_rng([settings.seed, number]).integers(1 << 62)))
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate * _rate(number, len(self._steps))
        pairs = [self._pairs[at] for at in self._steps[number]]
        rng = np.random.default_rng([settings.seed, number, 1])
        pairs = with_rivals(pairs, self._rivals, rng)
        tokens = sum(len(pair.targets[0]) for pair in pairs)
        sums = np.zeros(2)
        for some in passes(pairs, self._most):
            own, contrast = losses(self._model, some, settings.temperature)
            torch.autograd.backward(own / tokens + settings.contrast * contrast / len(pairs))
            sums += float(own.detach()) / tokens, float(contrast.detach()) / len(pairs)
        norm = torch.nn.utils.clip_grad_norm_(self._weights.values(), _CLIP)
        if not (np.isfinite(sums).all() and math.isfinite(float(norm))):
            self._fail()
        return float(sums[0]), float(sums[1])

    def _fail(self) -> NoReturn:
        """Go back to the last checkpoint, write the adapter as it was there, and say so."""
        at, kept = self._done, "There is no checkpoint yet"
        if self._resume():
            self._write_adapter()
            kept = f"The adapter as it was at the last checkpoint, step {self._done}, is in {str(self.out)!r}"
        raise EngineError(
            f"the loss is not a number at step {at + 1} of {len(self._steps)}. {kept}. Begin anew in another folder, "
            f"with a lower learning rate (now {self.settings.learning_rate:g})."
        )

    def _checkpoint(self) -> None:
        state = {
            "key": self._key,
            "step": self._done,
            "losses": self.losses,
            "weights": {name: weight.detach().cpu() for name, weight in self._weights.items()},
            "optimizer": self._optimizer.state_dict(),
        }
        checkpoint.save(self.out, state)

    def _resume(self) -> bool:
        """Take up a checkpoint; False where there is none."""
        state = checkpoint.load(self.out, self._key)
        if state is None:
            return False
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(state["weights"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._done, self.losses = state["step"], [(own, contrast) for own, contrast in state["losses"]]
        log.info("going on behind step %d of %d", self._done, len(self._steps))
        return True

    def _describe(self, pairs: Sequence[Pair]) -> str:
        """What two trainings that end in the same adapter have in common."""
        settings = {name: value for name, value in asdict(self.settings).items() if name != "checkpoint_s"}
        said = json.dumps([self.fingerprint, settings, self._most, [asdict(pair) for pair in pairs]])
        return hashlib.blake2b(said.encode(errors="surrogatepass"), digest_size=12).hexdigest()

    def _write_adapter(self) -> None:
        """PEFT's files, in bfloat16, and enough beside them that the base can be checked."""
        from peft import get_peft_model_state_dict

        named = get_peft_model_state_dict(self._model, save_embedding_layers=False)
        small = {name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in named.items()}
        config = self._model.peft_config["default"].to_dict()
        config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
        self.write_record({})
        checkpoint.write(self.out / WEIGHTS, safetensors.torch.save(small))
        checkpoint.write(self.out / CONFIG, json.dumps(config, indent=2, default=str).encode())

    def write_record(self, record: dict[str, Any]) -> dict[str, Any]:
        """Write the adapter's ``bon.json``: its base, how it was made, and ``record``."""
        whole = {
            "base": self._base.name,
            "fingerprint": self.fingerprint,
            "settings": asdict(self.settings),
            "pairs": len(self._pairs),
            "steps": self._done,
            **record,
            "loss": [own for own, _ in self.losses],
        }
        if self.settings.contrast:
            whole["contrast"] = [contrast for _, contrast in self.losses]
        checkpoint.write(
            self.out / RECORD, json.dumps(whole, indent=2, ensure_ascii=False).encode(errors="backslashreplace")
        )
        return whole


def _with_adapter(model: Any, base: str, settings: Settings) -> Any:
    """The model with an adapter on all of its linear layers but the last, the only weights that are trained."""
    try:
        import peft
    except ModuleNotFoundError as error:
        raise MissingExtraError("PEFT, which makes adapters,", "pip install 'bon[train]'") from error
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        lora_dropout=settings.dropout,
        target_modules="all-linear",
    )
    torch.manual_seed(settings.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT's own, about names in transformers
        adapted = peft.get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def _rate(step: int, of: int) -> float:
    """Share of the learning rate at a step: it rises, and falls as a cosine."""
    rise = max(1, round(_RISE * of))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, of - rise)))
