"""How many threads do the arithmetic of a model on a CPU.

The rule: as many as torch would take (one for each physical core), no more than the process may use (its affinity, its
control groups' quota), and none for cores that others keep busy at the moment. Two threads on one free core wait for
each other at every layer: with a busy neighbour that took three times as long as one thread. OMP_NUM_THREADS, where it
is set, and the engine's option ``threads`` come first.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from time import sleep

import torch

from bon.engines import cgroups

_LOOK_S = 0.1


def threads_for(cores: int, quota: float | None, busy: float) -> int:
    """The rule.

    Args:
        cores: that the process may run on.
        quota: processors' worth of time that it may use; None for no limit.
        busy: cores' worth of time that is being used by others.
    """
    allowed = cores if quota is None else min(cores, int(quota))
    return max(1, min(allowed, round(cores - busy)))


@cache
def choose_threads() -> int:
    """The number for this process; looks at the machine once, for a tenth of a second."""
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    before = _times()
    sleep(_LOOK_S)
    after = _times()
    spent = [(after[cpu][0] - before[cpu][0], after[cpu][1] - before[cpu][1]) for cpu in own if cpu in before]
    busy = sum(1 - idle / total for idle, total in spent if total > 0)
    return min(torch.get_num_threads(), threads_for(len(own), cgroups.cpu_quota(), busy))


def _times(stat: Path = Path("/proc/stat")) -> dict[int, tuple[int, int]]:
    """Processor -> its idle time and all of its time so far, in clock ticks; empty where there is no such file."""
    try:
        lines = [line.split() for line in stat.read_text().splitlines()]
    except OSError:  # not Linux
        return {}
    times = {int(name[3:]): [*map(int, numbers[:8])] for name, *numbers in lines if name[:3] == "cpu" and name != "cpu"}
    return {cpu: (ticks[3] + ticks[4], sum(ticks)) for cpu, ticks in times.items()}
