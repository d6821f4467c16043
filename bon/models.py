"""Models by name: which engine runs one, loaded once, placed together, and closed by whoever loaded it.

A ``ModelPool`` closes exactly what it loaded. An engine that the caller made stays the caller's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, Self

from bon.catalog import CATALOG, packaged
from bon.engines.base import Adapts, Engine, Generates
from bon.engines.function import FunctionEngine
from bon.engines.gguf import gguf_file
from bon.errors import InputError, ModelNotFoundError, UnknownNameError, UserCodeError, whole_number
from bon.scorers.base import Scorer
from bon.spec import ENGINES, OBJECT, SCORERS, import_object, join_spec, names_object, split_spec

log = logging.getLogger("bon")

MINI = "mini"
"""The name of the embedded model."""


@dataclass(frozen=True)
class Model:
    """A model that the user names, not loaded yet.

    Args:
        name: a Hugging Face name, a folder, a GGUF file, a URL, a name that ``bon models`` lists, or "mini" for the
            embedded model.
        engine: which registered engine runs it; None chooses.
        options: of the engine; ``adapter`` is the folder of a LoRA adapter, which any number of models on the same
            base have each their own of.
    """

    name: str = MINI
    engine: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: str | Path | Model | None, **options: Any) -> Model:
        """Read a spec such as "Qwen/Qwen3-4B,engine=vllm,max_model_len=8192".

        Args:
            model: a spec, a folder, or None for the embedded model.
            options: further ones, which the spec must not repeat.

        Raises:
            InputError: an empty name, an option given twice, or an engine that does not exist.
        """
        if isinstance(model, Model):
            name, given, engine = model.name, dict(model.options), model.engine
        elif model is None:
            name, given, engine = MINI, {}, None
        else:
            name, given = (str(model), {}) if isinstance(model, Path) else split_spec(model)
            engine = given.pop("engine", None)
        if twice := given.keys() & options.keys():
            raise InputError(f"{min(twice)} is given twice, in {str(model)!r} and beside it.")
        options = {**given, **options}
        engine = options.pop("engine", engine)
        _check_name(name, engine)
        if "adapter" in options and packaged(name) is not None:
            raise InputError(f"{name!r} is a LoRA adapter itself and takes no adapter=. Name its base.")
        if engine is None and name in ENGINES and not ENGINES.takes_argument(name):
            engine = name
        if engine is not None:
            ENGINES[engine]
        return cls(name, engine, options)

    @property
    def text(self) -> str:
        """The spec."""
        return join_spec(self.name, {**({"engine": self.engine} if self.engine else {}), **self.options})

    @property
    def key(self) -> tuple[Any, ...]:
        """What two names of the same model have in common."""
        return self.name, self.runs_on, *sorted((name, repr(value)) for name, value in self.options.items())

    @property
    def adapter(self) -> str | Path | None:
        """The folder of its LoRA adapter: the option ``adapter``, or of one that comes with bon."""
        return packaged(self.name) or self.options.get("adapter")

    @property
    def base(self) -> Model:
        """The model without its LoRA adapter: both share one engine's weights."""
        entry = CATALOG.get(self.name)
        options = {name: value for name, value in self.options.items() if name != "adapter"}
        return replace(self, name=entry.base if entry and entry.base else self.name, options=options)

    @property
    def runs_on(self) -> str:
        """The engine that runs it here."""
        return self.engine or choose_engine(self.name)

    @property
    def embedded(self) -> bool:
        """Whether it is the embedded mini model."""
        return self.name == MINI and self.runs_on in ("torch", "vllm")


_OLLAMA = "Ollama's models are reached over HTTP: http://localhost:11434/v1#{1}"
_ELSEWHERE = (  # names that mean something, but elsewhere: what to write here
    (
        r"bon[-_]mini|mini",
        "the embedded model is called 'mini' here, not {0!r}; 'bon-mini' is what bon serve calls it.",
    ),
    (
        r"((localhost|[\w-]+(\.[\w-]+)+):\d+(/.*)?)|((localhost|[\w-]+(\.[\w-]+)+)/v\d+/?)",
        "a server's address begins with http:// or https://. Did you mean http://{0}?",
    ),
    (
        r"(openai/)?(gpt-\d|chatgpt-|o\d(-|$)).*",
        "{0!r} is a model of OpenAI's API: write https://api.openai.com/v1#{1}, with the key in OPENAI_API_KEY.",
    ),
    (
        r"(claude|gemini)-[\w.-]+",
        "{0!r} is reached over HTTP: write the address of an OpenAI-compatible API that has it, and #{0} behind it.",
    ),
    (r"(ollama/[\w.-]+(:[\w.-]+)?)|([\w.-]+:[\w.-]+)", "{0!r} is neither a folder nor a Hugging Face name. " + _OLLAMA),
)


def _check_name(name: str, engine: str | None) -> None:
    """Refuse what can be no model's name, and say what was probably meant; an engine that is named knows its own."""
    if not name:
        raise InputError("a model's name is empty.")
    if name == MINI:
        return
    if ":" in name and name.partition(":")[0] in SCORERS:
        raise InputError(f"{name!r} is a scorer's spec, not a model. Write --scorer {name} or scorer={name!r}.")
    advice = next((advice for pattern, advice in _ELSEWHERE if re.fullmatch(pattern, name, re.IGNORECASE)), None)
    if advice is not None and engine is None and not OBJECT.fullmatch(name) and not os.path.exists(name):
        raise InputError(advice.format(name, name.removeprefix("openai/").removeprefix("ollama/")))


class ModelPool:
    """The models that somebody needs, each loaded once however often it is named.

    ``aclose`` or leaving an ``async with`` frees what was loaded here, and nothing else.

    Args:
        threads: of the arithmetic of models that run on the CPU and whose spec does not say; None leaves it to their
            engines.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads if threads is None else whole_number("threads", threads, 1)
        self._engines: dict[tuple[Any, ...], Engine] = {}
        self._wrapped: list[Scorer | FunctionEngine] = []  # around functions that were passed in
        self._lock = threading.Lock()

    def engine(self, model: str | Path | Model | None = None, **options: Any) -> Engine:
        """The engine of a model, loaded now if it was not.

        Raises:
            ModelNotFoundError: the model is neither on disk nor can it be fetched.
            UnknownNameError: no such engine, or an option that the engine does not have.
            MissingExtraError: the engine needs a package that is not installed.
        """
        spec = Model.of(model, **options)
        self.load([spec])
        return self._engines[spec.key]

    def load(self, models: Sequence[Model]) -> None:
        """Load what is not there yet; several models on vLLM start at the same time and share the GPU."""
        with self._lock:
            missing = {m.base.key: m.base for m in models if m.base.key not in self._engines}
            adapted = {m.key: (m, m.adapter) for m in models if m.adapter is not None and m.key not in self._engines}
            for key, model in missing.items():
                folders = [folder for each, folder in adapted.values() if each.base.key == key]
                if folders and model.runs_on == "vllm":  # it has to know of them when it starts
                    missing[key] = replace(model, options={**model.options, "adapters": folders})
            if len(missing) > 1 and {m.runs_on for m in missing.values()} == {"vllm"}:
                from bon.engines.placement import load_together

                shared = {} if self.threads is None else {"threads": self.threads}
                named = [(weights_of(m), {**shared, **m.options}) for m in missing.values()]
                made = load_together(named, lambda name, given: self._make(Model(name, "vllm", given)))
                self._engines.update(zip(missing, made, strict=True))
            else:
                for key, model in missing.items():
                    self._engines[key] = self._make(model)
            for key, (model, folder) in adapted.items():
                base = self._engines[model.base.key]
                if not isinstance(base, Adapts):
                    raise InputError(
                        f"{base.name!r} takes no adapter=: language models on torch and on vLLM do. A server has its "
                        "own way to name one."
                    )
                self._engines[key] = base.adapted(folder)

    def _make(self, model: Model) -> Engine:
        arguments = [weights_of(model)] if ENGINES.takes_argument(model.runs_on) else []
        if not arguments and model.name != model.runs_on:
            raise InputError(f"the engine {model.engine!r} runs no model, so it cannot be {model.name!r}.")
        defaults = {} if self.threads is None else {"threads": self.threads}
        engine: Engine = ENGINES.construct(model.runs_on, arguments, model.options, defaults)
        return engine

    def policy(self, policy: Any) -> Generates:
        """The engine of what was passed as a policy.

        Args:
            policy: a model's spec or folder, an engine, "module:object", a function, or None for the embedded model.

        Raises:
            InputError: none of these, or an engine that cannot be sampled.
        """
        engine = self._unloaded(policy)
        engine = self.engine(engine) if isinstance(engine, Model) else engine
        if not isinstance(engine, Generates):
            raise InputError(f"{engine.name!r} cannot be sampled, so it is no policy.")
        return engine

    def scorer(self, scorer: Any, policy: Engine | Model | None = None) -> Scorer:
        """A scorer whose models are there.

        Args:
            scorer, policy: see ``as_scorer``; scorers that name no model of their own run on the policy's.
        """
        unbound = self._unbound(scorer, policy)
        models = [policy if m is None else m for m in unbound.models]
        self._load_for(unbound, [Model.of(m) for m in models if not isinstance(m, Engine)])

        def find(model: Model | None) -> Engine:
            if model is not None or policy is None or isinstance(policy, Model):
                return self.engine(policy if model is None else model)  # type: ignore[arg-type]
            if isinstance(policy, FunctionEngine):
                raise InputError(
                    f"the policy {policy.name!r} is a function, which cannot score by itself. "
                    "Name a model to score with, for example the scorer flip:Qwen/Qwen3-0.6B."
                )
            return policy

        return unbound.bound(find)

    def both(self, policy: Any, scorer: Any) -> tuple[Generates, Scorer]:
        """Policy and scorer, their models loaded together."""
        named = self._unloaded(policy)
        unbound = self._unbound(scorer, named)
        wanted = [named, *(named if m is None else m for m in unbound.models)]
        self._load_for(unbound, [m for m in wanted if isinstance(m, Model)])
        engine = self.policy(named)
        return engine, self.scorer(unbound, engine)

    def _load_for(self, scorer: Scorer, models: Sequence[Model]) -> None:
        """Load models; an option that a scorer passed on to an engine that does not have it may be meant for either."""
        try:
            self.load(models)
        except UnknownNameError as error:
            if not any(error.name in model.options for model in scorer.models if model is not None):
                raise
            own = [name for name in signature(type(scorer)).parameters if name not in ("model", "options")]
            what = f"option of {scorer.name}, or of the engine of its model,"
            raise UnknownNameError(what, error.name, [*own, *error.known]) from error

    def _unbound(self, scorer: Any, policy: Engine | Model | None) -> Scorer:
        unbound = as_scorer(scorer, policy)
        if unbound is not scorer:
            self._wrapped.append(unbound)
        return unbound

    def _wrap(self, function: Callable[..., Any], name: str | None = None) -> FunctionEngine:
        self._wrapped.append(engine := FunctionEngine(function, name))
        return engine

    def _unloaded(self, policy: Any) -> Engine | Model:
        if isinstance(policy, Engine) and not isinstance(policy, type):
            return policy
        if policy is None or isinstance(policy, str | Path | Model):
            if not (isinstance(policy, str) and names_object(policy)):
                return Model.of(policy)
            found = import_object(policy)
            if isinstance(found, Engine) and not isinstance(found, type):
                return found
            if callable(found) and not isinstance(found, type):
                return self._wrap(found, policy)
            raise UserCodeError(f"{policy!r} is no function and no engine, but {type(found).__name__}.")
        if callable(policy) and not isinstance(policy, type):
            return self._wrap(policy)
        raise InputError(f"a policy is a model name, a folder, a URL, an engine or a function, not {policy!r:.80}.")

    async def aclose(self) -> None:
        """Free what was loaded here, all of it even where something cannot be closed; the first error is raised."""
        made = [*self._wrapped, *self._engines.values()]
        self._engines, self._wrapped = {}, []
        closed = await asyncio.gather(*(one.aclose() for one in made), return_exceptions=True)
        for error in closed:
            if error is not None:
                raise error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


def as_scorer(scorer: Any, policy: Engine | Model | None = None) -> Scorer:
    """Read what was passed as a scorer; no model is loaded.

    Args:
        scorer: a ``Scorer``; a spec such as "likelihood:Qwen/Qwen3-0.6B"; a reward function, or "module:object" for one
            or for a scorer; an engine or the name of a model, which FLIP then runs on; None for ``Default``, or FLIP
            for the embedded model, which was trained for it.
        policy: what writes; None is the embedded model.

    Raises:
        InputError: none of these.
    """
    from bon.scorers.default import Default
    from bon.scorers.flip import Flip
    from bon.scorers.function import RewardFunction

    if isinstance(scorer, Scorer):
        return scorer
    name = None
    if isinstance(scorer, str):
        if not scorer.strip():
            raise InputError(f"the scorer is empty. Known: {', '.join(sorted(SCORERS))}, module:function, a model.")
        head = split_spec(scorer)[0].partition(":")[0]
        if head in SCORERS:
            made: Scorer = SCORERS.make(scorer)
            return made
        if names_object(scorer):
            name, scorer = scorer, import_object(scorer)
            scorer = _instance(scorer, name) if isinstance(scorer, type) else scorer
        elif "/" not in head and not os.path.exists(head) and SCORERS.close_to(head):
            raise UnknownNameError("scorer", head, [*SCORERS, "module:function"])
    if isinstance(scorer, Scorer):
        return scorer
    if scorer is None and not (policy is None or (isinstance(policy, Model) and policy.embedded)):
        return Default()
    if scorer is None or isinstance(scorer, str | Path | Model | Engine):
        return Flip(scorer)
    if isinstance(scorer, type):
        raise InputError(f"a scorer is an object and not a class: write {scorer.__name__}(...).")
    if callable(scorer):
        return RewardFunction(scorer, name)
    if name is not None:
        raise UserCodeError(f"{name!r} is no scorer and no function, but {type(scorer).__name__}.")
    raise InputError(f"a scorer is a Scorer, its spec, a model, an engine or a reward function, not {scorer!r:.80}.")


def _instance(factory: Callable[[], Any], name: str) -> Any:
    try:
        return factory()
    except Exception as error:
        raise UserCodeError(f"{name!r} raised {type(error).__name__}: {error}") from error


def weights_of(model: Model) -> str:
    """The folder or the name that an engine loads.

    Raises:
        ModelNotFoundError: what can be neither for the engines that run models here.
    """
    if model.name == MINI:
        from bon.mini import WEIGHTS

        return str(WEIGHTS)
    folder = Path(model.name).expanduser()
    if model.engine is None and OBJECT.fullmatch(model.name) and not folder.exists():
        raise ModelNotFoundError(
            f"{model.name!r} is neither a folder nor a model on this machine, and it is no object of yours: there is "
            f"no module {model.name.partition(':')[0]!r}. {_OLLAMA.format('', model.name)}"
        )
    # vLLM reads Mistral's format as well, and a LoRA adapter names its base.
    configs = [folder / name for name in ("config.json", "params.json", "adapter_config.json")]
    held = gguf_file(model.name) or any(path.is_file() for path in configs)
    if model.runs_on in ("torch", "vllm") and folder.is_dir() and not held:
        raise ModelNotFoundError(
            f"the folder {model.name!r} holds no model: it has neither config.json nor a GGUF file. A model's folder "
            "has config.json, weights (*.safetensors) and the tokenizer's files."
        )
    return model.name


def choose_engine(name: str) -> str:
    """The engine of a model for which the user names none; said once in the log.

    HTTP for URLs. vLLM where it is installed and there is a CUDA GPU. Torch for the rest, and always for GGUF files and
    for the embedded mini model, which is done before vLLM has started.
    """
    if name.startswith(("http://", "https://")):
        return "http"
    return "torch" if name == MINI or gguf_file(name) else _local_engine()


@cache
def _local_engine() -> str:
    """What runs models on this machine; where there is no choice, nothing is said."""
    if find_spec("vllm") is None:
        if not _has_cuda():
            return "torch"
        name, reason = "torch", "vLLM is not installed, which is faster on a CUDA GPU (pip install 'bon[vllm]')"
    elif not _has_cuda():
        name, reason = "torch", "vLLM is installed, and there is no CUDA GPU; engine=vllm takes its CPU build"
    else:
        name, reason = "vllm", "vLLM is installed and there is a CUDA GPU; engine=torch avoids it"
    log.info("models run on %s: %s", name, reason)
    return name


def _has_cuda() -> bool:
    """Ask the driver: CUDA is not to be initialised in this process, which may not use it."""
    import torch

    name = "PYTORCH_NVML_BASED_CUDA_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        return torch.cuda.is_available()
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
