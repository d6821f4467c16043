"""What the user says, as engines and scorers: names, folders, URLs, functions and objects all end up here."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bon.engines.base import Engine, choose_engine, load_engine
from bon.engines.function import FunctionEngine
from bon.engines.placement import load_together
from bon.errors import BonError, InputError, UserCodeError
from bon.mini import WEIGHTS
from bon.scorers import BackwardLikelihood, Flip
from bon.scorers.base import Scorer

OBJECT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""What names something of the user's own: "package.module:name"."""


def load_both(
    policy: Any, flip: Any, engine: str | None = None, options: Mapping[str, Any] | None = None
) -> tuple[Any, Any]:
    """Load two models that are both given by name at the same time, where vLLM runs them; else hand back what came.

    They share the GPU by the rule of ``bon.engines.placement``. A scorer of bon's that only names its model so far gets
    it here.

    Args:
        policy, flip: see ``BestOfN``.
        engine: which back end loads models given by name; None chooses.
        options: for both, where they are bare names.
    """
    lazy = flip._model if isinstance(flip, (Flip, BackwardLikelihood)) else None
    scoring, own = (flip, options or {}) if lazy is None else lazy.unloaded or (None, {})
    first = WEIGHTS if policy is None and engine == "vllm" else policy
    models: list[tuple[Any, dict[str, Any]]] = [(first, dict(options or {})), (scoring, dict(own))]
    named = all(isinstance(model, (str, Path)) and not OBJECT.fullmatch(str(model)) for model, _ in models)
    if not named or policy == scoring:
        return policy, flip
    if {given.pop("engine", None) or engine or choose_engine(model) for model, given in models} != {"vllm"}:
        return policy, flip
    loaded = load_together(models)
    if lazy is None:
        return loaded[0], loaded[1]
    lazy.adopt(loaded[1])
    return loaded[0], flip


def as_policy(policy: Any, engine: str | None = None) -> Engine:
    """Turn what was passed as policy into an engine.

    Raises:
        InputError: not a model, an engine or a function.
    """
    if isinstance(policy, Engine):
        return policy
    if policy is None or isinstance(policy, (str, Path)):
        if not (isinstance(policy, str) and OBJECT.fullmatch(policy)):
            return load_engine(policy, engine=engine)
        found = import_object(policy)
        if isinstance(found, Engine) and not isinstance(found, type):
            return found
        if callable(found):
            return FunctionEngine(found, policy)
        raise UserCodeError(f"{policy!r} is no function and no engine, but {type(found).__name__}.")
    if callable(policy):
        return FunctionEngine(policy)
    raise InputError(f"a policy is a model name, a folder, an engine or a function, not {policy!r:.80}.")


def as_scorer(flip: Any, policy: Any, policy_engine: Engine, engine: str | None = None) -> Scorer:
    """Turn what was passed as flip into a scorer.

    Args:
        flip: see ``BestOfN``.
        policy: what the user passed as policy; the same name, bare or in a scorer of bon's, means the same engine.
        policy_engine: the engine that it became.
        engine: which back end loads a model given by name.

    Raises:
        InputError: not a model, an engine, a function or a scorer; or nothing, and the policy is a function.
    """
    if isinstance(flip, (Flip, BackwardLikelihood)):
        if flip._model.unloaded == (policy, {}):
            return flip.on(policy_engine)
        if flip.engine is None:
            return flip.on(_own_engine(policy_engine))
    if isinstance(flip, Scorer):
        return flip
    if flip is None:
        return Flip(_own_engine(policy_engine))
    if isinstance(flip, (str, Path)) and flip == policy:
        return Flip(policy_engine)
    if isinstance(flip, (str, Path, Engine)) or callable(flip):
        return Flip(as_policy(flip, engine))
    raise InputError(f"flip is a model name, a folder, an engine, a function or a scorer, not {flip!r:.80}.")


def _own_engine(policy_engine: Engine) -> Engine:
    if isinstance(policy_engine, FunctionEngine):
        raise InputError(
            f"the policy {policy_engine.name!r} is a function, which cannot score by itself. "
            "Name a model to score with, for example flip='Qwen/Qwen3-0.6B'."
        )
    return policy_engine


def import_object(spec: str) -> Any:
    """Import "package.module:name"; modules in the current folder are found too.

    Raises:
        UserCodeError: the module cannot be imported, or has no such name.
    """
    module_name, _, name = spec.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except BonError:
        raise
    except ModuleNotFoundError as error:
        raise UserCodeError(f"cannot import {spec!r}: there is no module {error.name!r}.") from error
    except Exception as error:
        raise UserCodeError(f"cannot import {spec!r}: {type(error).__name__}: {error}.") from error
    if not hasattr(module, name):
        raise UserCodeError(f"cannot import {spec!r}: the module {module_name!r} has no {name!r}.")
    return getattr(module, name)
