"""The models that a benchmark's command line names, loaded, and what the report should say of them."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bon import portal
from bon.bench.models import SHAPES, describe, dummy_model, open_engine, word_ids
from bon.engines.base import Engine, load_engine
from bon.engines.placement import bytes_of, load_together, need_of, place, visible_gpus
from bon.errors import EngineError, InputError
from bon.mini import WEIGHTS

RESETS = 5000
"""Tries to empty a prefix cache."""


def model_options(options: argparse.ArgumentParser) -> None:
    """Add the options that say what runs."""
    options.add_argument("--engine", default="torch", choices=["torch", "vllm"], help="what runs the models")
    options.add_argument("--policy", type=Path, help="folder of the policy; the mini model when not given")
    options.add_argument("--flip", type=Path, help="folder of the scorer; the policy when not given")
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
        policy: what writes.
        scorer: what infers instructions.
        facts: what they are, for the conditions.
        dummy: whether the weights are random, so that texts say nothing and lengths have to be forced.
    """

    policy: Engine
    scorer: Engine
    facts: dict[str, Any]
    dummy: bool = False
    _folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    def forget(self) -> None:
        """Empty the prefix caches, see ``forget``."""
        forget(self.policy, self.scorer)

    def close(self) -> None:
        """Free the models."""
        for engine in {id(engine): engine for engine in (self.policy, self.scorer)}.values():
            portal.run(engine.aclose())
        if self._folder is not None:
            self._folder.cleanup()


def open_models(options: argparse.Namespace) -> Models:
    """Load what the command line names; two models on vLLM start at the same time and share a GPU by bon's rule.

    Raises:
        InputError: --dummy without --engine vllm, together with real models, or with more than two shapes.
        BonError: a model that cannot be loaded.
    """
    if options.dummy:
        return _open_dummies(options)
    facts = {"policy": describe(options.policy), "scorer": describe(options.flip or options.policy)}
    if options.flip is None:
        engine = open_engine(options.policy, options)
        return Models(engine, engine, facts)
    if options.engine == "vllm":
        named = [options.policy or WEIGHTS, options.flip]
        policy, scorer = load_together([(model, {"dtype": options.dtype}) for model in named])
        return Models(policy, scorer, facts)
    return Models(open_engine(options.policy, options), open_engine(options.flip, options), facts)


def _open_dummies(options: argparse.Namespace) -> Models:
    if options.engine != "vllm":
        raise InputError("--dummy needs --engine vllm: it is vLLM that makes up the weights.")
    if options.policy or options.flip or len(options.dummy) > 2:
        raise InputError("--dummy takes one or two shapes, in place of --policy and --flip.")
    folder = tempfile.TemporaryDirectory(prefix="bon-dummy-")
    folders = [dummy_model(Path(folder.name) / str(i), config) for i, config in enumerate(options.dummy)]
    names = [config if config in SHAPES else Path(config).stem for config in options.dummy]
    facts = [{**describe(f), "model": f"dummy {name}"} for f, name in zip(folders, names, strict=True)]
    made = {"dtype": options.dtype, "load_format": "dummy"}
    if len(folders) == 1:
        engines: list[Engine] = [load_engine(folders[0], engine="vllm", **made)]
    else:
        placed = _placed(folders, [f["parameters"] for f in facts], options.dtype)
        engines = load_together([(f, {**made, **where}) for f, where in zip(folders, placed, strict=True)])
    return Models(engines[0], engines[-1], {"policy": facts[0], "scorer": facts[-1]}, True, folder)


def _placed(folders: Sequence[Path], parameters: Sequence[int], dtype: str) -> list[dict[str, Any]]:
    """Where dummies go on a single GPU: bon's rule counts the bytes of weight files, and these have none."""
    gpus = visible_gpus()
    if len(gpus) != 1:
        return [{} for _ in folders]
    sizes = [bytes_of(dtype) * count for count in parameters]
    needs = [need_of(str(folder), dtype) for folder in folders]
    return place([replace(need, weights=size) for need, size in zip(needs, sizes, strict=True)], gpus)


def forced(engine: Engine) -> dict[str, Any]:
    """``Sampling.extra`` under which a completion on vLLM has ``max_tokens`` tokens, each an ordinary word.

    What the words are does not matter, only that there are so many and that they are the same tokens when they are read
    again: the end token is ignored and nothing but words that are one token may be sampled.
    """
    words = word_ids(engine.renderer.tokenizer)  # type: ignore[attr-defined]
    return {"ignore_eos": True, "allowed_token_ids": words}


def forget(*engines: Engine) -> None:
    """Empty the prefix caches of vLLM engines, so that no side finds there what another one computed.

    Other engines keep nothing from one call to the next.

    Raises:
        EngineError: an engine that is still at work.
    """
    for engine in engines:
        llm = getattr(getattr(engine, "_engine", None), "llm", None)
        if llm is not None:
            portal.run(_reset(llm))


async def _reset(llm: Any) -> None:
    for _ in range(RESETS):
        if await llm.reset_prefix_cache():
            return
        await asyncio.sleep(0.002)  # aborted requests free their blocks a step later
    raise EngineError("the prefix cache cannot be emptied: requests are still running.")
