"""The models that a benchmark's command line names, loaded, and what the report should say of them."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bon import portal
from bon.bench.harness import forget
from bon.engines.placement import bytes_of, need_of, place, visible_gpus
from bon.errors import InputError
from bon.models import Model, ModelPool
from lib.models import SHAPES, describe, dummy_model, model_of, word_ids


def model_options(options: argparse.ArgumentParser) -> None:
    """Add the options that say what runs."""
    options.add_argument("--engine", default="torch", choices=["torch", "vllm"], help="what runs the models")
    options.add_argument("--policy", type=Path, help="folder of the policy; the mini model when not given")
    options.add_argument("--scorer", type=Path, help="folder of the scorer; the policy when not given")
    options.add_argument(
        "--dummy",
        nargs="+",
        metavar="CONFIG",
        help=f"with --engine vllm: random weights in the shape of a config.json, a folder with one, or one of "
        f"{', '.join(SHAPES)}; a second one is the scorer's",
    )


@dataclass
class Models:
    """A policy and a scorer's engine, which are the same object when they are the same model.

    Args:
        pool: what loaded them, and frees them.
        policy: what writes.
        scorer: what infers instructions.
        facts: what they are, for the conditions.
        dummy: whether the weights are random, so that texts say nothing and lengths have to be forced.
    """

    pool: ModelPool
    policy: Any
    scorer: Any
    facts: dict[str, Any]
    dummy: bool = False
    _folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    @classmethod
    def load(cls, models: Sequence[Model], *facts: dict[str, Any], **more: Any) -> Models:
        """Load one model for both roles, or two together; two on vLLM share a GPU by bon's rule."""
        pool = ModelPool()
        pool.load(models)
        engines = [pool.engine(model) for model in models]
        return cls(pool, engines[0], engines[-1], {"policy": facts[0], "scorer": facts[-1]}, **more)

    def forget(self) -> None:
        """Empty the prefix caches, see ``forget``."""
        forget(self.policy, self.scorer)

    def close(self) -> None:
        """Free the models."""
        portal.run(self.pool.aclose())
        if self._folder is not None:
            self._folder.cleanup()


def open_models(options: argparse.Namespace) -> Models:
    """Load what the command line names.

    Raises:
        InputError: --dummy without --engine vllm, together with real models, or with more than two shapes.
        BonError: a model that cannot be loaded.
    """
    if options.dummy:
        return _open_dummies(options)
    folders = [options.policy, *([options.scorer] if options.scorer else [])]
    return Models.load([model_of(folder, options) for folder in folders], *map(describe, folders))


def _open_dummies(options: argparse.Namespace) -> Models:
    if options.engine != "vllm":
        raise InputError("--dummy needs --engine vllm: it is vLLM that makes up the weights.")
    if options.policy or options.scorer or len(options.dummy) > 2:
        raise InputError("--dummy takes one or two shapes, in place of --policy and --scorer.")
    temporary = tempfile.TemporaryDirectory(prefix="bon-dummy-")
    folders = [dummy_model(Path(temporary.name) / str(i), config) for i, config in enumerate(options.dummy)]
    names = [config if config in SHAPES else Path(config).stem for config in options.dummy]
    facts = [{**describe(f), "model": f"dummy {name}"} for f, name in zip(folders, names, strict=True)]
    placed = _placed(folders, [f["parameters"] for f in facts], options.dtype) if len(folders) > 1 else [{}]
    models = [model_of(f, options, load_format="dummy", **where) for f, where in zip(folders, placed, strict=True)]
    return Models.load(models, *facts, dummy=True, _folder=temporary)


def _placed(folders: Sequence[Path], parameters: Sequence[int], dtype: str) -> list[dict[str, Any]]:
    """Where dummies go on a single GPU: bon's rule counts the bytes of weight files, and these have none."""
    gpus = visible_gpus()
    if len(gpus) != 1:
        return [{} for _ in folders]
    sizes = [bytes_of(dtype) * count for count in parameters]
    needs = [need_of(str(folder), dtype) for folder in folders]
    return place([replace(need, weights=size) for need, size in zip(needs, sizes, strict=True)], gpus)


def forced(engine: Any) -> dict[str, Any]:
    """``Sampling.extra`` under which a completion on vLLM has ``max_tokens`` tokens, each an ordinary word.

    What the words are does not matter, only that there are so many and that they are the same tokens when they are read
    again: the end token is ignored and nothing but words that are one token may be sampled.
    """
    words = word_ids(engine.renderer.tokenizer)
    return {"ignore_eos": True, "allowed_token_ids": words}
