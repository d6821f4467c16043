"""Control groups of Linux: the limits that a container or a batch system sets to this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def folders(controller: str, root: Path = ROOT) -> Iterator[Path]:
    """The groups that a process is in, the innermost first, under version 2 and version 1.

    Args:
        controller: of version 1 ("memory", "cpu"); version 2 has one tree for all.
        root: where ``proc`` and ``sys`` are.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    mounted = root / "sys/fs/cgroup"
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            trees = [mounted, mounted / "unified"]
        elif controller in controllers.split(","):
            trees = [mounted / controller, mounted / controllers]
        else:
            continue
        inside = PurePosixPath(path.lstrip("/"))
        # Seen from inside a container the path may not exist, but the mounted root is then the group itself.
        for tree in trees:
            yield from (tree / part for part in (inside, *inside.parents) if (tree / part).is_dir())


def number(file: Path, field: str | None = None) -> int | None:
    """The number in a group's file, or behind the name of a field; None where there is none ("max")."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        words = line.split()
        if field is not None and words[:1] == [field]:
            words = words[1:]
        elif field is not None:
            continue
        return int(words[0]) if words and words[0].lstrip("-").isdigit() else None
    return None


def cpu_quota(root: Path = ROOT) -> float | None:
    """Processors' worth of time that the groups allow; None for no limit."""
    found = []
    for folder in folders("cpu", root):
        try:
            limit, period = (folder / "cpu.max").read_text().split()
        except OSError:
            limit, period = (str(number(folder / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
        if limit.isdigit() and period.isdigit():
            found.append(int(limit) / int(period))
    return min(found, default=None)
