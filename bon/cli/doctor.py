"""``bon doctor``: what is installed, which engines can run here, and what to type for those that cannot."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "vllm", "openai", "fastapi", "ray")


@dataclass(frozen=True)
class EngineReport:
    """Whether an engine can run here, and what to do where it cannot."""

    name: str
    ok: bool
    detail: str


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> int:
    """Show what is installed, which engines can run here, and what to type for those that cannot."""
    from bon.cli.console import print_bytes
    from bon.output import to_json

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
    return 0


def examine() -> dict[str, Any]:
    """Look around; imports torch, if it is there, to ask for devices."""
    from bon import __version__
    from bon.cli.console import quiet_libraries
    from bon.engines.base import ENGINES
    from bon.mini import WEIGHTS

    quiet_libraries(False)
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
        "engines": [asdict(_engine(name)) for name in ENGINES],
    }


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
    found = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, f"cpu ({torch.get_num_threads()} threads)"]


def _engine(name: str) -> EngineReport:
    """Look for the engine's package, and for the engine itself."""
    from bon.engines.base import ENGINES

    backend = ENGINES[name]
    if importlib.util.find_spec(backend.module) is None:
        return EngineReport(name, False, f"the package {backend.module!r} is not installed. Type: {backend.install}")
    if importlib.util.find_spec(backend.target.partition(":")[0]) is None:
        return EngineReport(name, False, "this version of bon does not have it yet")
    return EngineReport(name, True, _USES.get(name, backend.module))


_USES = {
    "torch": "any Hugging Face decoder, and the embedded mini model",
    "vllm": "continuous batching, prefix cache",
    "openai": "any OpenAI-compatible URL",
    "scripted": "a fake for tests and documentation",
}
