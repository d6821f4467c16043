"""Configuration as data: what a ``BestOfN`` is made from, as it stands in a file or on the command line.

policy = "Qwen/Qwen3-4B-Instruct-2507"
scorer = "flip:Qwen/Qwen3-0.6B,samples=4"
n = 16

[sampling]
temperature = 0.8
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from bon.best_of_n import BestOfN
from bon.budget import as_budget, spec_of
from bon.errors import InputError, UnknownNameError, whole_number
from bon.models import Model, as_scorer
from bon.pipeline import SCHEDULES, Schedule
from bon.selectors import as_selector
from bon.spec import SCORERS, SELECTORS, names_object
from bon.types import Sampling


@dataclass(frozen=True)
class Config:
    """What the arguments of ``BestOfN`` are, as text and numbers.

    Args:
        policy, scorer: specs; None as in ``BestOfN``.
        n: a number or the spec of a budget.
        selector: a spec.
        min_reward, prune, schedule, threads: as in ``BestOfN``.
        sampling: fields of ``Sampling``.

    Raises:
        UnknownNameError: a name or an option that does not exist.
        InputError: a value that cannot be. No model is loaded, so options of an engine are not checked.
    """

    policy: str | None = None
    scorer: str | None = None
    n: int | str = 8
    selector: str = "best"
    min_reward: float | None = None
    prune: bool = True
    schedule: Schedule | None = None
    threads: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("policy", "scorer", "selector", "schedule"):
            if not isinstance(getattr(self, name), str | None):
                raise InputError(f"{name} must be text, got {getattr(self, name)!r:.60}.")
        if not isinstance(self.prune, bool):
            raise InputError(f"prune must be true or false, got {self.prune!r}.")
        if not isinstance(self.sampling, Mapping):
            raise InputError(f"sampling must be a table of options, got {self.sampling!r:.60}.")
        if self.schedule not in (None, *SCHEDULES):
            raise UnknownNameError("schedule", self.schedule, SCHEDULES)
        if self.threads is not None:
            whole_number("threads", self.threads, 1)
        if self.policy is not None and not names_object(self.policy):
            Model.of(self.policy)
        if self.scorer is not None and not names_object(self.scorer):
            as_scorer(self.scorer)
        as_budget(self.n)
        as_selector(self.selector, self.min_reward)
        Sampling.of(self.sampling)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Read a mapping; a name that no field has is refused."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise UnknownNameError("setting", name, known)
        return cls(**values)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a TOML file.

        Raises:
            InputError: it cannot be read, is no TOML, or has a setting that cannot be; the message names the file.
        """
        try:
            return cls.of(tomllib.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise InputError(f"cannot read the configuration {str(path)!r}: {error.strerror}.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not TOML: {error}") from error
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    @classmethod
    def from_bon(cls, bon: BestOfN) -> Self:
        """The configuration of a ``BestOfN`` whose parts were given as text or can be written as text.

        Raises:
            InputError: an engine, a function or a selector of the user's own is among them.
        """
        policy, scorer = (getattr(given, "text", given) for given in bon.given)  # a ``Model`` has its spec
        if not isinstance(policy, str | Path | None):
            raise InputError(f"the policy {bon.policy.name!r} is an object of its own, and has no spec.")
        selector: Any = bon.given_selector
        return cls(
            policy=None if policy is None else str(policy),
            scorer=None
            if scorer is None
            else str(scorer)
            if isinstance(scorer, str | Path)
            else SCORERS.spec_of(scorer),
            n=spec_of(bon.budget),
            selector=selector if isinstance(selector, str) else SELECTORS.spec_of(selector),
            min_reward=bon.min_reward,
            prune=bon.prune,
            schedule=bon.schedule,
            threads=bon.threads,
            sampling=bon.sampling.to_dict(),
        )

    def to_dict(self) -> dict[str, Any]:
        """Every setting, in the form that ``of`` reads."""
        return {**dataclasses.asdict(self), "sampling": dict(self.sampling)}

    def to_toml(self) -> str:
        """Every setting that is not None, in the form that ``read`` reads.

        Raises:
            InputError: a sampling option whose value has no form in TOML.
        """
        settings = {name: value for name, value in self.to_dict().items() if value is not None}
        sampling = settings.pop("sampling")
        lines = [f"{name} = {_toml(value)}" for name, value in settings.items()]
        lines += [
            "",
            "[sampling]",
            *(f"{name} = {_toml(value)}" for name, value in sampling.items() if value is not None),
        ]
        return "\n".join(lines) + "\n"

    def changed(self, **changes: Any) -> Self:
        """A copy with some settings changed; sampling options are added to those that are there."""
        sampling = {**self.sampling, **changes.pop("sampling", {})}
        return dataclasses.replace(self, **changes, sampling=sampling)

    def build(self) -> BestOfN:
        """Load the models that it names."""
        return BestOfN(**self.to_dict())


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(str(name))} = {_toml(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    raise InputError(f"{value!r:.60} has no form in TOML.")
