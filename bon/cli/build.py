"""Options to objects: which engines are loaded, what scores, who selects.

Whatever can be refused without loading a model is refused first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from bon.best_of_n import BestOfN
from bon.cli.console import one_thread, quiet_libraries
from bon.engines.base import ENGINES, Engine, choose_engine, engine_class, load_engine
from bon.engines.function import FunctionEngine
from bon.errors import BonError, InputError, UnknownNameError, UserCodeError
from bon.resolve import OBJECT, as_policy, import_object, load_both
from bon.scorers.base import Scorer
from bon.scorers.flip import Flip
from bon.scorers.function import RewardFunction
from bon.scorers.likelihood import BackwardLikelihood
from bon.selectors import Selector, Softmax, TopK, WeightedVote, as_selector
from bon.types import Sampling

SCORERS = ("flip", "likelihood")
SELECTORS = ("best", "top-k", "softmax", "vote")


@dataclass(frozen=True)
class Options:
    """What the command line says about models, scoring and choice; None where it says nothing."""

    n: int = 8
    policy: str | None = None
    flip: str | None = None
    scorer: str = "flip"
    style: str | None = None
    samples: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    selector: str = "best"
    min_reward: float | None = None
    prune: bool = True
    stop_at: float | None = None
    engine: str | None = None
    device: str | None = None
    dtype: str | None = None

    @property
    def embedded_policy(self) -> bool:
        """Whether the embedded mini model writes the candidates."""
        return self.policy is None and self.engine in (None, "torch", "vllm")

    @property
    def embedded_scorer(self) -> bool:
        """Whether the embedded mini model scores candidates that came from elsewhere."""
        return self.flip is None and self.scorer in SCORERS and self.engine in (None, "torch", "vllm")


@dataclass
class Built:
    """A ``BestOfN`` and the engines that were loaded for it."""

    bon: BestOfN
    engines: list[Engine]

    async def aclose(self) -> None:
        """Free the models."""
        await self.bon.aclose()
        for engine in self.engines:
            await engine.aclose()


def build(options: Options, *, sampled: bool = True) -> Built:
    """Load what the options name.

    Args:
        options: from the command line.
        sampled: False where candidates come from elsewhere, so that no policy is needed.

    Raises:
        BonError: an option that makes no sense, a model that cannot be loaded.
    """
    if options.n < 1:
        raise InputError(f"-n must be a whole number of at least 1, got {options.n}.")
    sampling = Sampling.of(options.sampling)
    selector = as_selector(parse_selector(options.selector, sampling.seed), options.min_reward)
    scorer = _own_scorer(options)
    load = _Loader(options)
    load.check(options.policy if sampled else None, options.flip)
    if not sampled:
        policy = load(options.flip) if scorer is None else _no_policy()
        flip_engine = policy
    else:
        if scorer is None:
            load.together(options.policy, options.flip)
        policy = load(options.policy)
        flip_engine = policy if scorer or options.flip in (None, options.policy) else load(options.flip)
    if scorer is None:
        scorer = _flip_scorer(options, flip_engine)
    bon = BestOfN(
        policy,
        scorer,
        n=options.n,
        sampling=sampling,
        selector=selector,
        prune=options.prune,
        stop_at=options.stop_at,
    )
    return Built(bon, list(load.loaded.values()))


def parse_selector(spec: str, seed: int | None) -> str | Selector:
    """Read "best", "top-k:3", "softmax:0.5" or "vote:REGEX".

    Raises:
        InputError: an unknown name, or a value that the selector does not take.
    """
    name, _, value = spec.partition(":")
    if name not in SELECTORS:
        raise UnknownNameError("selector", name, SELECTORS)
    if name == "vote":
        if not value:
            raise InputError(
                "the selector 'vote' needs a pattern that finds the answer, such as vote:'answer is (.+)'."
            )
        return WeightedVote(value)
    try:
        if name == "top-k":
            return TopK(int(value))
        if name == "softmax":
            return Softmax(float(value) if value else 1.0, seed)
    except ValueError as error:
        raise InputError(
            f"the selector {spec!r} needs a number, such as {'top-k:3' if name == 'top-k' else 'softmax:0.5'}."
        ) from error
    if value:
        raise InputError(f"the selector 'best' takes no value, got {value!r}.")
    return "best"


def _no_policy() -> Engine:
    return as_policy(lambda prompt: "")


def _own_scorer(options: Options) -> Scorer | None:
    """The user's scorer object or reward function; None where one of bon's own is asked for."""
    if options.scorer != "flip" and (options.style or options.samples is not None):
        name = "--style" if options.style else "--samples"
        raise InputError(f"{name} belongs to the scorer 'flip', not to {options.scorer!r}.")
    if options.scorer in SCORERS:
        return None
    if not OBJECT.fullmatch(options.scorer):
        raise UnknownNameError("scorer", options.scorer, [*SCORERS, "module:function"])
    if options.flip is not None:
        raise InputError(f"--flip names a model to infer instructions with; the scorer {options.scorer!r} uses none.")
    found = import_object(options.scorer)
    if isinstance(found, type):
        found = _call(found, options.scorer)
    if isinstance(found, Scorer):
        return found
    if callable(found):
        return cast(Scorer, RewardFunction(found, options.scorer))
    raise InputError(f"{options.scorer!r} is no scorer and no function, but {type(found).__name__}.")


def _flip_scorer(options: Options, engine: Engine) -> Scorer:
    if isinstance(engine, FunctionEngine) and options.flip in (None, options.policy):
        raise InputError(
            f"the policy {options.policy!r} is a function, which cannot score by itself. "
            "Name a model to score with: --flip MODEL."
        )
    if options.scorer == "likelihood":
        return BackwardLikelihood(engine)
    chosen: dict[str, Any] = {"prompt": options.style, "samples": options.samples}
    return Flip(engine, **{name: value for name, value in chosen.items() if value is not None})


class _Loader:
    """Loads every model once, however often it is named."""

    def __init__(self, options: Options) -> None:
        self.engine = options.engine
        self.options = {k: v for k, v in (("device", options.device), ("dtype", options.dtype)) if v is not None}
        self.loaded: dict[str | None, Engine] = {}

    def check(self, *specs: str | None) -> None:
        """Refuse what needs no model to be refused, and set the libraries' manners."""
        if self.engine is not None and self.engine not in ENGINES:
            raise UnknownNameError("engine", self.engine, ENGINES)
        if self.engine == "scripted" and self.options:
            raise InputError(f"the scripted engine takes no --{next(iter(self.options))}: it runs no model.")
        if self.engine not in (None, "torch", "scripted") and "device" in self.options:
            raise InputError(f"--device is for the engine 'torch'; {self.engine!r} finds its devices by itself.")
        quiet_libraries(any(spec and not OBJECT.fullmatch(spec) and not os.path.exists(spec) for spec in specs))

    def together(self, policy: str | None, flip: str | None) -> None:
        """Start two vLLM models at the same time, each with its part of the GPU."""
        loaded = load_both(policy, flip, self.engine, self.options)
        if loaded != (policy, flip):
            self.loaded.update(zip((policy, flip), loaded, strict=True))

    def __call__(self, spec: str | None) -> Engine:
        if spec not in self.loaded:
            self.loaded[spec] = self._load(spec)
        return self.loaded[spec]

    def _load(self, spec: str | None) -> Engine:
        if spec is not None and OBJECT.fullmatch(spec):
            return as_policy(spec)
        if spec is not None and not spec.strip():
            raise InputError("a model's name is empty.")
        if spec is None and self.engine == "scripted":
            return engine_class("scripted")()
        if spec is not None and self.engine == "scripted":
            raise InputError(
                f"the scripted engine runs no model, so it cannot be {spec!r}. Leave out --engine scripted."
            )
        if spec is None:
            one_thread()
        if (self.engine or choose_engine(spec)) == "openai" and self.options:
            raise InputError(f"--{next(iter(self.options))} is for models on this machine, and {spec} is a URL.")
        return load_engine(spec, engine=self.engine, **self.options)


def _call(factory: Callable[[], Any], spec: str) -> Any:
    try:
        return factory()
    except BonError:
        raise
    except Exception as error:
        raise UserCodeError(f"{spec!r} raised {type(error).__name__}: {error}") from error
