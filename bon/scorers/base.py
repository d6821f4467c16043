"""The scorer contract: candidates in, one score each out."""

from __future__ import annotations

import copy
import difflib
import inspect
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from bon.engines.base import Engine, Rates
from bon.errors import BonError, EngineError, InputError, UnknownNameError
from bon.spec import Specified
from bon.task import Task
from bon.types import Candidate, Sampling, Score, Usage

if TYPE_CHECKING:
    from bon.group import Group
    from bon.models import Model


@dataclass(frozen=True, slots=True)
class Needs:
    """What a scorer cannot do without.

    Args:
        group: all candidates of a task in one call, copies included.
        logprobs: the policy's log-probabilities of each candidate.
        top_logprobs: how many of the likeliest tokens at each place, where the policy's server tells them.
        reference: ``Task.reference``.
        all_rewards: a reward for every candidate: nothing is pruned.
    """

    group: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    reference: bool = False
    all_rewards: bool = False

    def asked(self, sampling: Sampling) -> Sampling:
        """How a policy samples for it."""
        return sampling.replace(
            logprobs=sampling.logprobs or self.logprobs, top_logprobs=max(sampling.top_logprobs, self.top_logprobs)
        )


@dataclass(frozen=True, slots=True)
class Pending:
    """A candidate that waits for its score, and the group that it belongs to."""

    group: Group
    candidate: Candidate

    @property
    def task(self) -> Task:
        """What the candidate answers."""
        return self.group.task


def by_group(pending: Sequence[Pending]) -> list[list[int]]:
    """Positions of the candidates of each group."""
    groups: dict[int, list[int]] = {}
    for position, each in enumerate(pending):
        groups.setdefault(id(each.group), []).append(position)
    return [*groups.values()]


def can(engine: Engine, ability: type | UnionType) -> bool:
    """Whether an engine has an ability; one that rates may still lack what it takes (``HTTPEngine.rates``)."""
    return isinstance(engine, ability) and (ability is not Rates or getattr(engine, "rates", True))


def unscored(error: BonError, usage: Usage | None = None) -> Score:
    """The score of a candidate that a model could not be asked about; an outage says nothing about the candidate."""
    outage = error if isinstance(error, EngineError) else None
    return Score(None, "failed", f"not scored: {error}", usage=usage or Usage(), error=outage)


class Scorer(ABC, Specified):
    """A source of rewards.

    Attributes:
        needs: what it cannot do without.
        range: the least and the largest reward, where there is one; stopping and pruning may rely on it.
        concurrent: whether calls may run at the same time, each candidate scored as it finishes.
        models: the models that it runs and that are still to be loaded; None is the policy's own.
        version: changes with what decides its rewards and is not in its spec, such as what a file of it holds.
    """

    needs: ClassVar[Needs] = Needs()
    range: tuple[float, float] | None = None
    concurrent: bool = False
    models: Sequence[Model | None] = ()
    version: str = ""

    @property
    def name(self) -> str:
        """What to call the scorer in a table."""
        return type(self).__name__

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name})"

    @property
    def engines(self) -> Sequence[Engine]:
        """What it runs on, once its models are in place."""
        return ()

    def bound(self, find: Callable[[Model | None], Engine]) -> Self:
        """The same scorer with its models in place; ``find`` has the engine of each of ``models``."""
        return self

    @abstractmethod
    def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Score every candidate exactly once, in any order; candidates have text here.

        Yields:
            (position in ``pending``, score). A candidate that cannot be scored gets the status "failed" with a reason,
            never a number; a task that cannot be is ``pending[position].group.fail(error)``. What is raised belongs to
            the groups that still lack a score; if these are several, each is scored again by itself to see whose it is.
        """

    async def settle(self, tied: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Rate candidates that share the best reward of their task, once all have theirs; most scorers do not.

        Args:
            tied: one candidate of each text, at least two of each group.

        Yields:
            (position in ``tied``, score), each position at most once: its reward becomes ``Score.tie_break``.
        """
        return
        yield

    async def aclose(self) -> None:
        """Free what the scorer itself holds. Its models belong to whoever loaded them."""


class Compound(Scorer):
    """A scorer that is made of others.

    Attributes:
        parts: these.
    """

    parts: Sequence[Scorer]

    @property
    def part_names(self) -> list[str]:
        """The parts' names; one that a part before it has as well is numbered."""
        names = [part.name for part in self.parts]
        return [f"{name} ({at + 1})" if name in names[:at] else name for at, name in enumerate(names)]

    @property
    def version(self) -> str:  # type: ignore[override]
        """The parts'."""
        return " ".join(part.version for part in self.parts).strip()

    @property
    def models(self) -> Sequence[Model | None]:  # type: ignore[override]
        """What is still to be loaded for the parts."""
        return tuple(model for part in self.parts for model in part.models)

    @property
    def engines(self) -> Sequence[Engine]:
        """What the parts run on."""
        return tuple(engine for part in self.parts for engine in part.engines)

    @property
    def concurrent(self) -> bool:  # type: ignore[override]
        """Whether calls may run at the same time: where they may for all parts."""
        return all(part.concurrent for part in self.parts)

    def bound(self, find: Callable[[Model | None], Engine]) -> Self:
        """The same with all models in place."""
        other = copy.copy(self)
        other.parts = [part.bound(find) for part in self.parts]
        return other

    async def aclose(self) -> None:
        """Free what the parts hold."""
        for part in self.parts:
            await part.aclose()


class ModelScorer(Scorer):
    """A scorer that runs one language model.

    Args:
        model: an engine or a function, which stay the caller's; a model's spec or folder; or None for the policy's own.
        ability: what the engine must be able to do: ``Generates``, ``Rates``, ``Classifies``, ...
        hosts: what runs a model given by name in place of the engine of that name; a URL's is ``HTTPEngine``.
        options: of the engine that loads a model given by name.

    Raises:
        InputError: none of these, or options for an engine that is already there.
    """

    ability: ClassVar[type | UnionType]
    hosts: ClassVar[Mapping[str | None, str]] = {}

    def __init__(self, model: str | Path | Model | Engine | Callable[..., Any] | None, options: dict[str, Any]) -> None:
        from bon.engines.function import FunctionEngine
        from bon.models import Model

        own = [name for name in inspect.signature(type(self)).parameters if name not in ("model", "options")]
        for option in options:
            if difflib.get_close_matches(option, own, n=1, cutoff=0.8):  # rather a typo than an option of an engine
                raise UnknownNameError(f"option of {type(self).__name__}", option, own)
        self._engine: Engine | None = None
        self.model: Model | None = None
        if isinstance(model, str | Path | Model) or (model is None and options):
            self.model = Model.of(model, **options)
            if not self.model.name.startswith(("http://", "https://")):
                self.model = replace(self.model, engine=self.hosts.get(self.model.engine, self.model.engine))
            return
        if options:
            raise InputError(f"{', '.join(sorted(options))}: options are for models loaded by name.")
        if model is not None:
            engine: Any = model if isinstance(model, Engine) else FunctionEngine(model) if callable(model) else None
            if engine is None or isinstance(model, type):
                raise InputError(f"a scorer's model is a name, a folder, an engine or a function, not {model!r:.80}.")
            self._engine = self._able(engine)

    @property
    def models(self) -> Sequence[Model | None]:  # type: ignore[override]
        """What is still to be loaded."""
        return () if self._engine is not None else (self.model,)

    @property
    def engine(self) -> Any:
        """The engine that it runs on.

        Raises:
            InputError: none was given and none has been loaded.
        """
        if self._engine is None:
            raise InputError(
                f"{self.name} has no engine yet: BestOfN, bon.score and ModelPool().scorer(...) load what it names."
            )
        return self._engine

    @property
    def engines(self) -> Sequence[Engine]:
        """What it runs on."""
        return (self.engine,)

    @property
    def concurrent(self) -> bool:  # type: ignore[override]
        """Whether calls may run at the same time."""
        return bool(self.engine.concurrent)

    @property
    def _model_name(self) -> str:
        return self._engine.name if self._engine else self.model.name if self.model else "the policy"

    def on(self, engine: Engine) -> Self:
        """Return the same scorer on an engine, which stays its owner's."""
        other = copy.copy(self)
        other._engine = self._able(engine)
        return other

    def bound(self, find: Callable[[Model | None], Engine]) -> Self:
        """The same scorer on the engine of its model."""
        return self if self._engine is not None else self.on(find(self.model))

    def _able(self, engine: Engine) -> Engine:
        if not can(engine, self.ability):
            able = {
                "Generates": "be sampled",
                "Rates": "give log-probabilities of a text",
                "Classifies": "classify a text (a reward model)",
                "Embeds": "embed a text (an embedding model)",
                "Reads": "show its hidden states (engine=torch)",
                "Weighs": "tell how sure it is at each token (engine=torch or vllm; over HTTP take deepconf)",
            }
            name = getattr(self.ability, "__name__", "Weighs")  # one of two has none
            what = able.get(name, name)
            named = isinstance(engine, self.ability)  # which says what kinds of engines can
            remedy = " Over HTTP it can where its tokenizer is named: tokenizer=NAME." if named else ""
            raise InputError(
                f"{type(self).__name__} needs a model that can {what}, and {engine.name!r} cannot.{remedy}"
            )
        return engine
