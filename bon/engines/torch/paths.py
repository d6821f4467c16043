"""The way a call takes through the model: prefixes shared, or as transformers does it.

A model whose prefixes cannot be shared is found out by what its configuration says and by a trial run, never by a
wrong answer.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from bon.engines.memory import out_of_memory
from bon.engines.torch.prefix.attention import NAME, NotServedError
from bon.engines.torch.prefix.shared import Preamble, SharedRows, Store
from bon.engines.torch.prefix.tree import Ids, arrange, common, preamble
from bon.engines.torch.rows import PlainRows, Rows, Run

log = logging.getLogger(__name__)

_ROPE_TYPES = {"default", "linear", "llama3", "yarn", "proportional"}  # the others depend on the batch's longest row


class Path(Protocol):
    """How the prompts of one call run.

    Attributes:
        order: prompts in the order in which they shall be batched.
        own: per prompt, in the order in which they were given, the tokens that the one before it in ``order`` has not.
        pads: whether the prompts of a batch are padded to the longest when they are read.
    """

    order: list[int]
    own: list[int]
    pads: bool

    def rows(self, store: Store | None = None, *, keep: bool = False) -> Rows:
        """A fresh batch.

        Args:
            store: of prompts that were read before, for a path that can keep them.
            keep: whether to keep those of the batch there.
        """

    def cost(self, prompts: int, rows: int, longest: int, new: int) -> int:
        """Tokens that there is room for in the keys and values of a batch.

        Args:
            prompts: how many prompts.
            rows: how many rows they become.
            longest: tokens of the longest prompt.
            new: tokens that a row generates at most.
        """


class PlainPath:
    """Every row has a whole context of its own."""

    pads = True

    def __init__(self, run: Run, prompts: Sequence[Ids]) -> None:
        self._run = run
        self.own = [len(prompt) for prompt in prompts]
        self.order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))

    def rows(self, store: Store | None = None, *, keep: bool = False) -> Rows:
        """See ``Path.rows``; nothing is kept."""
        return PlainRows(self._run)

    def cost(self, prompts: int, rows: int, longest: int, new: int) -> int:
        """See ``Path.cost``."""
        return rows * (longest + new)


class SharedPath:
    """What prompts begin with together exists once."""

    pads = False

    def __init__(self, run: Run, prompts: Sequence[Ids]) -> None:
        self._run = run
        self._root = Preamble(preamble(prompts))
        self.order = arrange(prompts)
        ordered = [prompts[i] for i in self.order]
        shared = [len(self._root.ids), *(common(a, b) for a, b in itertools.pairwise(ordered))]
        own = {i: len(prompts[i]) - count for i, count in zip(self.order, shared, strict=False)}
        self.own = [own[i] for i in range(len(prompts))]

    def rows(self, store: Store | None = None, *, keep: bool = False) -> Rows:
        """See ``Path.rows``."""
        return SharedRows(self._run, self._root, store, keep=keep)

    def cost(self, prompts: int, rows: int, longest: int, new: int) -> int:
        """See ``Path.cost``."""
        return prompts * (longest - len(self._root.ids)) + rows * new


class Paths:
    """Knows whether a model's prefixes can be shared, and sets its attention accordingly.

    Args:
        run: the model, and the limits of a pass.
        share: whether prefixes shall be shared where they can.
    """

    def __init__(self, run: Run, share: bool) -> None:
        self._run, self._share = run, share
        self._plain: str = run.model.config._attn_implementation
        self._current = self._plain
        self._limit: int | None = None
        self._checked = self._told = False

    def choose(self, prompts: Sequence[Ids], longest: int, check: Callable[[], object]) -> Path:
        """The path for these prompts, none of which grows beyond ``longest`` tokens.

        Args:
            prompts: token ids.
            longest: tokens of the longest, with what is generated.
            check: see ``Run``.
        """
        shared = self._can_share() and (self._limit is None or longest <= self._limit)
        if self._share and not shared and not self._told:
            self._told = True
            log.info("prefixes are not shared: some layers attend to %s tokens, %d are needed", self._limit, longest)
        self._attend(NAME if shared else self._plain)
        return (SharedPath if shared else PlainPath)(replace(self._run, check=check), prompts)

    @property
    def unlimited(self) -> bool:
        """Whether prefixes are shared, however long prompts and completions are; known once a path was chosen."""
        return self._share and self._limit is None

    def plain(self) -> None:
        """Let the model attend as transformers has it, for calls that take no path."""
        self._attend(self._plain)

    def close(self) -> None:
        """Let go of the model."""
        self._run = Run(None)

    def _can_share(self) -> bool:
        if self._share and not self._checked:
            try:
                self._limit = longest_served(self._run.model)
                check(self._run.model)
            except NotServedError as error:
                self._share = False
                log.info("prefixes are not shared with this model: %s", error)
            except Exception as error:
                if out_of_memory(error):  # says nothing about the model: the next call finds out
                    raise
                self._share = False
                log.warning("prefixes are not shared, as their check failed with %r; this is a fault of bon's", error)
            finally:
                self._run.model.set_attn_implementation(self._plain)
            self._checked = True
        return self._share

    def _attend(self, name: str) -> None:
        if name != self._current:
            self._run.model.set_attn_implementation(name)
            self._current = name


def longest_served(model: Any) -> int | None:
    """Tokens up to which every layer of a model attends to its whole context; None for no limit.

    Raises:
        NotServedError: the model has something that shared prefixes do not serve; the message says what.
    """
    config = model.config.get_text_config(decoder=True)
    if not getattr(model, "_supports_attention_backend", False):
        raise NotServedError("it does not use transformers' attention interface")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise NotServedError(f"it has layers of type {sorted(unknown)}")
    if unknown := _rope_types(getattr(config, "rope_parameters", None)) - _ROPE_TYPES:
        raise NotServedError(f"its position encoding is {sorted(unknown)}")
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds if getattr(config, "layer_types", None) else window is not None
    return int(window) if slides and window else None


def _rope_types(parameters: Any) -> set[str]:
    if not isinstance(parameters, dict):
        return set()
    own = {str(parameters["rope_type"])} if "rope_type" in parameters else set()
    return own.union(*(_rope_types(value) for value in parameters.values()))


def check(model: Any) -> None:
    """Run a few made-up prompts both ways and compare.

    Raises:
        NotServedError: shared prefixes give this model other logits than transformers does.
    """
    generator = np.random.default_rng(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    root, *contexts = (generator.integers(0, vocabulary, size).tolist() for size in (17, 18, 19))
    prompts = [(*root, *contexts[i // 2], *generator.integers(0, vocabulary, 2 + i).tolist()) for i in range(4)]
    tokens = torch.from_numpy(generator.integers(0, vocabulary, (2, 6))).to(model.device)
    alive = np.array([True, False, True, True, True, True])
    found = []
    plain = model.config._attn_implementation
    run = Run(model, tokens=16)  # so that long rows come in several passes, and short ones share one
    for name in (plain, NAME):
        model.set_attn_implementation(name)
        rows = PlainRows(run) if name == plain else SharedRows(run, Preamble(tuple(root)))
        outputs = [rows.prefill(prompts, [1, 2, 1, 2]), rows.step(tokens[0])]
        back = np.argsort(order := rows.select(alive))
        outputs.append(rows.step(tokens[1][torch.from_numpy(order).to(model.device)])[torch.from_numpy(back)])
        found.append(torch.cat(outputs).float())
    expected, got = found
    apart = (expected - got) / expected.std()
    if model.dtype == torch.float32:
        worst, tolerance = float(apart.abs().max()), 1e-3
    else:  # between any two kernels a real model's logits differ by a third, a row's by a sixth (root mean square)
        worst, tolerance = float(apart.square().mean(-1).sqrt().max()), 0.3
    if not worst < tolerance:
        raise NotServedError(f"its logits came out different by {worst:.1e} standard deviations")
