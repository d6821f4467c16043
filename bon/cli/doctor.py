"""``bon doctor``: what is installed, what can be named, which engine runs models here, and how to change that."""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bon.cli.options import JSON

if TYPE_CHECKING:
    from bon.spec import Registry

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "vllm", "aiohttp", "fastapi")
EXTRAS = {"pyarrow": "parquet", "datasets": "evals", "peft": "train", "trl": "trl", "dspy": "dspy"}
"""Packages that an extra of bon's brings, which is named where they are missing."""


def doctor(as_json: JSON = False) -> int:
    """Show what is installed, what can be named, which engine runs models here, and how to change that."""
    from bon.cli.terminal import print_json

    report = examine()
    if as_json:
        print_json(report)
        return 0
    for title, part in report.items():
        if title == "chosen":
            print("chosen, unless a spec names another: MODEL,engine=NAME")
            for choice in part:
                print(f"  {choice['for']}: {choice['engine']}\n    {choice['reason']}")
            continue
        print(title)
        for name, value in part.items() if isinstance(part, dict) else ((each["name"], _line(each)) for each in part):
            print(f"  {name:<13} {value if value is not None else _missing(name)}")
    return 0


def _missing(package: str) -> str:
    return f"not installed: pip install 'bon[{EXTRAS[package]}]'" if package in EXTRAS else "not installed"


def _line(found: dict[str, Any]) -> str:
    return found["detail"] if found["ok"] else f"cannot be used: {found['detail']}"


def examine() -> dict[str, Any]:
    """Look around; imports whatever is registered and installed, to see whether it can be."""
    from bon import __version__
    from bon.cli.terminal import quiet_libraries
    from bon.mini import WEIGHTS
    from bon.models import MINI, choose_engine
    from bon.spec import BUDGETS, DATASETS, ENGINES, SCORERS, SELECTORS

    quiet_libraries()
    logging.getLogger("bon").setLevel(logging.WARNING)  # the choice of the engine is part of the answer
    versions = {"bon": __version__, "python": platform.python_version()}
    listed = {f"{registry.kind}s": _list(registry) for registry in (ENGINES, SCORERS, SELECTORS, BUDGETS, DATASETS)}
    named = choose_engine("a model")
    vllm = next((engine["ok"] for engine in listed["engines"] if engine["name"] == "vllm"), False)
    return {
        "versions": versions | {name: _version(name) for name in (*PACKAGES, *EXTRAS)},
        "machine": {
            "system": platform.platform(),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "devices": ", ".join(_devices()),
            "model cache": os.environ.get("HF_HOME", os.path.join("~", ".cache", "huggingface")),
            "hub": "offline (HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else "online",
            "mini model": "ok" if (WEIGHTS / "config.json").exists() else "missing: reinstall bon",
        },
        **listed,
        "chosen": [
            {"for": "a model's name or folder", "engine": named, "reason": explain(named, vllm, _gpus())},
            {
                "for": "the embedded mini model",
                "engine": choose_engine(MINI),
                "reason": "it is done before another has started",
            },
            {"for": "a URL", "engine": choose_engine("http://"), "reason": "its server does the work"},
        ],
    }


def explain(models: str, vllm: bool, gpus: int) -> str:
    """Why models given by name or folder run where they do, and what to type to change that.

    Args:
        models: the engine that is chosen for them.
        vllm: whether vLLM can run.
        gpus: CUDA devices that torch sees.
    """
    seen = f"torch sees {gpus or 'no'} CUDA GPU{'' if gpus == 1 else 's'}"
    if models == "vllm":
        if vllm:
            return f"vLLM is installed, and {seen}. Without it: MODEL,engine=torch"
        return f"vLLM is installed, and {seen}, but it cannot run (see above). Until it can: MODEL,engine=torch"
    if vllm:
        return f"{seen}. vLLM runs them on the CPU: MODEL,engine=vllm"
    if gpus:
        return f"{seen}, and vLLM is not installed. To run them on it, type: pip install 'bon[vllm]'"
    return f"{seen}, and vLLM cannot run (see above). Its CPU build would run them on the CPU: MODEL,engine=vllm"


def _list(registry: Registry) -> list[dict[str, Any]]:
    """Everything that is registered: whether it can be imported, and what it is or what to do."""
    from bon.errors import BonError

    found = []
    for name in registry:
        try:
            said = inspect.getdoc(registry.load(name)) or "(it does not say what it is)"
            found.append({"name": name, "ok": True, "detail": said.partition("\n")[0]})
        except BonError as error:
            found.append({"name": name, "ok": False, "detail": str(error)})
        except Exception as error:  # whatever an import can raise
            detail = f"it cannot be imported ({type(error).__name__}: {error})"
            found.append({"name": name, "ok": False, "detail": detail})
    return found


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
