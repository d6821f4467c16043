"""A scorer's model: an engine that is there, or one that is loaded on first use."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Protocol, TypeVar

from bon.engines.base import Engine, load_engine
from bon.errors import InputError


class _HasModel(Protocol):
    _model: LazyEngine


S = TypeVar("S", bound=_HasModel)


class LazyEngine:
    """An engine that is there, or a model that is loaded on first use."""

    def __init__(self, model: str | Path | Engine | None, options: dict[str, Any]) -> None:
        self._engine: Engine | None = None
        self._name, self._options = model, options
        if not (model is None or isinstance(model, str | Path)):
            if not isinstance(model, Engine):
                raise InputError(f"a scorer's model must be a name, a folder or an engine, got {model!r}.")
            if options:
                raise InputError(f"{', '.join(sorted(options))}: options are for models loaded by name.")
            self._engine = model

    @property
    def name(self) -> str:
        """Name of the model."""
        return self._engine.name if self._engine else "mini" if self._name is None else str(self._name)

    @property
    def engine(self) -> Engine:
        """The engine, loaded now if it was not."""
        if self._engine is None:
            assert self._name is None or isinstance(self._name, str | Path)
            self._engine = load_engine(self._name, **self._options)
        return self._engine

    @property
    def named(self) -> Engine | None:
        """The engine, or None when nobody said which."""
        return None if self._engine is None and self._name is None else self.engine

    @property
    def unloaded(self) -> tuple[str | Path, dict[str, Any]] | None:
        """Name and options of a model that is still to be loaded; None where there is nothing to load."""
        if self._engine is not None or not isinstance(self._name, str | Path):
            return None
        return self._name, self._options

    def adopt(self, engine: Engine) -> None:
        """Take the engine that was loaded for ``unloaded`` elsewhere; it is freed like one that was loaded here."""
        self._engine = engine

    @staticmethod
    def moved(scorer: S, engine: Engine) -> S:
        """Return a copy of a scorer whose ``_model`` is another engine."""
        other = copy.copy(scorer)
        other._model = LazyEngine(engine, {})
        return other

    async def aclose(self) -> None:
        """Free the engine if it was loaded here; it loads again when it is needed."""
        if self._engine is not None and self._engine is not self._name:
            await self._engine.aclose()
            self._engine = None
