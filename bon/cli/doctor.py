"""``bon doctor``: what is installed, which engines can run here, which is chosen, and what to type to change that."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from bon.errors import BonError

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "vllm", "openai", "fastapi")


@dataclass(frozen=True)
class EngineReport:
    """Whether an engine can run here, and what to do where it cannot."""

    name: str
    ok: bool
    detail: str


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> int:
    """Show what is installed, which engines can run here, which is chosen, and what to type to change that."""
    from bon.cli.console import print_bytes
    from bon.data.sink import to_json

    report = examine()
    if as_json:
        print_bytes(to_json(report))
        return 0
    for title in ("versions", "machine"):
        print(title)
        for name, value in report[title].items():
            print(f"  {name:<14}{value if value is not None else 'not installed'}")
    print("engines")
    for engine in report["engines"]:
        print(f"  {engine['name']:<14}{'ok' if engine['ok'] else 'cannot run'}: {engine['detail']}")
    print("chosen, unless --engine says otherwise")
    for choice in report["chosen"]:
        print(f"  {choice['for']}: {choice['engine']}\n    {choice['reason']}")
    return 0


def examine() -> dict[str, Any]:
    """Look around; imports every engine that is installed, to see whether it can be."""
    from bon import __version__
    from bon.cli.console import quiet_libraries
    from bon.engines.base import ENGINES, choose_engine
    from bon.mini import WEIGHTS

    quiet_libraries(False)
    logging.getLogger("bon").setLevel(logging.WARNING)  # the choice of the engine is part of the answer
    engines = {name: _engine(name) for name in ENGINES}
    models = choose_engine("a model")
    versions = {"bon": __version__, "python": platform.python_version()}
    return {
        "versions": versions | {name: _version(name) for name in PACKAGES},
        "machine": {
            "system": platform.platform(),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "devices": ", ".join(_devices()),
            "model cache": os.environ.get("HF_HOME", os.path.join("~", ".cache", "huggingface")),
            "hub": "offline (HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else "online",
            "mini model": "ok" if (WEIGHTS / "config.json").exists() else "missing: reinstall bon",
        },
        "engines": [asdict(engine) for engine in engines.values()],
        "chosen": [
            {"for": "a model's name or folder", "engine": models, "reason": explain(models, engines["vllm"], _gpus())},
            {
                "for": "the embedded mini model",
                "engine": choose_engine(None),
                "reason": "it is done before vLLM has started",
            },
            {"for": "a URL", "engine": choose_engine("http://"), "reason": "its server does the work"},
        ],
    }


def explain(models: str, vllm: EngineReport, gpus: int) -> str:
    """Why models given by name or folder run where they do, and what to type to change that.

    Args:
        models: the engine that is chosen for them.
        vllm: whether vLLM can run.
        gpus: CUDA devices that torch sees.
    """
    seen = f"torch sees {gpus or 'no'} CUDA GPU{'' if gpus == 1 else 's'}"
    if models == "vllm":
        if vllm.ok:
            return f"vLLM is installed, and {seen}. Without it: --engine torch"
        return f"vLLM is installed, and {seen}, but it cannot run (see above). Until it can: --engine torch"
    if vllm.ok:
        return f"{seen}. vLLM runs them on the CPU: --engine vllm"
    if gpus:
        return f"{seen}, and vLLM is not installed. To run them on it, type: pip install 'bon[vllm]'"
    return f"{seen}, and vLLM cannot run (see above). Its CPU build would run them on the CPU: --engine vllm"


def _version(package: str) -> str | None:
    for name in (package, f"{package}-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _devices() -> list[str]:
    try:
        import torch
    except Exception as error:
        return [f"unknown: torch cannot be imported ({type(error).__name__}: {error})"]
    found = []
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        found.append(f"cuda:{i} {device.name} ({device.total_memory / (1 << 30):.0f} GiB)")
    if not found and Path("/proc/driver/nvidia/version").exists():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build for CPUs"
        found.append(f"an NVIDIA driver that torch {torch.__version__} does not reach ({build})")
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, f"cpu ({torch.get_num_threads()} threads)"]


def _gpus() -> int:
    try:
        import torch
    except Exception:  # which the list of devices says
        return 0
    return torch.cuda.device_count()


def _engine(name: str) -> EngineReport:
    """Import an engine, as it would be to run."""
    from bon.engines.base import engine_class

    try:
        engine_class(name)
    except BonError as error:
        return EngineReport(name, False, str(error))
    except Exception as error:
        return EngineReport(name, False, f"it cannot be imported ({type(error).__name__}: {error})")
    return EngineReport(name, True, _USES[name])


_USES = {
    "torch": "any Hugging Face decoder, and the embedded mini model",
    "vllm": "continuous batching, prefix cache",
    "openai": "any OpenAI-compatible URL",
    "scripted": "a fake for tests and documentation",
}
