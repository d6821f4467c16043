"""What memory and time a process may use, read from made-up control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from bon.engines.cgroups import cpu_quota
from bon.engines.memory import available_bytes, out_of_memory

GIB = 1 << 30


def machine(root: Path, groups: str, files: dict[str, str], free_kib: int = 20 << 20) -> Path:
    """A folder with the parts of ``/proc`` and ``/sys`` that are read."""
    for name, text in {
        "proc/self/cgroup": groups,
        "proc/meminfo": f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\nMemAvailable:   {free_kib} kB\n",
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_without_a_limit_it_is_what_the_machine_has_free(tmp_path: Path) -> None:
    files = {"app/memory.max": "max\n", "app/memory.current": "5\n", "app/cpu.max": "max 100000\n"}
    root = machine(tmp_path, "0::/app\n", files)
    assert available_bytes(root) == 20 * GIB
    assert cpu_quota(root) is None


def test_a_container_of_version_2_bounds_it_and_gives_back_idle_pages_of_files(tmp_path: Path) -> None:
    """A batch used to take a quarter of the machine, and the container was killed."""
    files = {
        "memory.max": "max",
        "pod/memory.max": f"{8 * GIB}",
        "pod/memory.current": f"{5 * GIB}",
        "pod/memory.stat": f"anon 1\ninactive_file {GIB}\nactive_file 7\n",
        "pod/app/memory.max": f"{30 * GIB}",
        "pod/app/memory.current": f"{GIB}",
        "pod/app/cpu.max": "150000 100000\n",
        "pod/cpu.max": "400000 100000\n",
    }
    root = machine(tmp_path, "0::/pod/app\n", files)
    assert available_bytes(root) == 4 * GIB
    assert cpu_quota(root) == 1.5


@pytest.mark.parametrize("inside", ["/docker/abc", "/"])
def test_a_container_of_version_1_bounds_it_wherever_its_group_is_seen(tmp_path: Path, inside: str) -> None:
    files = {
        "memory/memory.limit_in_bytes": f"{3 * GIB}",
        "memory/memory.usage_in_bytes": f"{GIB}",
        "cpu,cpuacct/cpu.cfs_quota_us": "50000",
        "cpu,cpuacct/cpu.cfs_period_us": "100000",
    }
    root = machine(tmp_path, f"4:memory:{inside}\n3:cpu,cpuacct:{inside}\n1:name=systemd:/\n", files)
    assert available_bytes(root) == 2 * GIB
    assert cpu_quota(root) == 0.5


def test_no_quota_of_version_1_is_none(tmp_path: Path) -> None:
    files = {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}
    assert cpu_quota(machine(tmp_path, "1:cpu:/\n", files)) is None


def test_a_machine_that_is_not_linux_has_half_of_its_memory(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) > GIB // 4
    assert cpu_quota(tmp_path) is None


def test_memory_that_ran_out_is_told_from_other_errors() -> None:
    assert out_of_memory(MemoryError())
    assert out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not out_of_memory(ValueError("out of memory"))
