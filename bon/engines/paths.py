"""The way a call takes through the model: prefixes shared, or as transformers does it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

from bon.engines.prefix_tree import Ids, arrange, preamble
from bon.engines.rows import PlainRows, Rows, Stats
from bon.engines.shared_prefix import NAME, Preamble, SharedRows, check, longest_served

log = logging.getLogger(__name__)


class Path(Protocol):
    """How the prompts of one call run.

    Attributes:
        order: prompts in the order in which they shall be batched.
        pads: whether the prompts of a batch are padded to the longest.
    """

    order: list[int]
    pads: bool

    def rows(self) -> Rows:
        """A fresh batch."""

    def cost(self, prompt: int, copies: int, new: int) -> int:
        """Tokens whose keys and values ``copies`` rows of one prompt need at most."""


class PlainPath:
    """Every row has a whole context of its own."""

    pads = True

    def __init__(self, model: Any, prompts: Sequence[Ids], stats: Stats) -> None:
        self._model, self._stats = model, stats
        self.order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))

    def rows(self) -> Rows:
        """A fresh batch."""
        return PlainRows(self._model, self._stats)

    def cost(self, prompt: int, copies: int, new: int) -> int:
        """Tokens whose keys and values ``copies`` rows of one prompt need at most."""
        return copies * (prompt + new)


class SharedPath:
    """What prompts begin with together exists once."""

    pads = False

    def __init__(self, model: Any, prompts: Sequence[Ids], stats: Stats) -> None:
        self._model, self._stats = model, stats
        self._root = Preamble(preamble(prompts))
        self.order = arrange(prompts)

    def rows(self) -> Rows:
        """A fresh batch."""
        return SharedRows(self._model, self._root, self._stats)

    def cost(self, prompt: int, copies: int, new: int) -> int:
        """Tokens whose keys and values ``copies`` rows of one prompt need at most."""
        return prompt - len(self._root.ids) + copies * new


class Paths:
    """Knows whether a model's prefixes can be shared, and sets its attention accordingly.

    Args:
        model: a causal language model of transformers.
        share: whether prefixes shall be shared where they can.
        stats: counts what is computed and stored.
    """

    def __init__(self, model: Any, share: bool, stats: Stats) -> None:
        self._model, self._stats, self._share = model, stats, share
        self._plain: str = model.config._attn_implementation
        self._current = self._plain
        self._limit: int | None = None
        self._checked = self._told = False

    def choose(self, prompts: Sequence[Ids], longest: int) -> Path:
        """The path for these prompts, none of which grows beyond ``longest`` tokens."""
        shared = self._can_share() and (self._limit is None or longest <= self._limit)
        if self._share and not shared and not self._told:
            self._told = True
            log.info("prefixes are not shared: some layers attend to %s tokens, %d are needed", self._limit, longest)
        self._attend(NAME if shared else self._plain)
        return (SharedPath if shared else PlainPath)(self._model, prompts, self._stats)

    def _can_share(self) -> bool:
        if self._share and not self._checked:
            self._checked = True
            try:
                self._limit = longest_served(self._model)
                check(self._model)
            except Exception as error:  # whatever a model that was never tried may raise: the plain path works
                log.info("prefixes are not shared with this model: %s", str(error).split("\n", 1)[0] or repr(error))
                self._share = False
                self._model.set_attn_implementation(self._plain)
        return self._share

    def _attend(self, name: str) -> None:
        if name != self._current:
            self._model.set_attn_implementation(name)
            self._current = name
