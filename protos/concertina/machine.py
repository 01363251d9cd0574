"""What this process may use of the machine: memory and cores, by its cgroup and its affinity.

In a container, what the machine has is not what the process gets: beyond its memory it is killed,
and beyond its cores its threads wait for each other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_ROOT: Final = Path("/")
_PARTS: Final = 8


def memory_bytes(root: Path = _ROOT) -> int:
    """The memory of this process at most. root: of the file system with /proc and /sys."""
    limits = [_machine_memory(root)]
    for folder in cgroups(root, "memory"):
        limits += _numbers(folder / "memory.max") or _numbers(folder / "memory.limit_in_bytes")
    return min(limit for limit in limits if limit > 0)


def share_of_memory(most: int, processes: int = 1, root: Path = _ROOT) -> int:
    """Memory for one thing that each of several processes keeps: an eighth of all, or `most`."""
    return min(most, memory_bytes(root) // (_PARTS * processes))


def cores(root: Path = _ROOT) -> int:
    """The cores of this process at most, at least 1; of a share of a core, nothing is counted."""
    most = float(_allowed_cores())
    for folder in cgroups(root, "cpu"):
        quota = _numbers(folder / "cpu.max") or [
            *_numbers(folder / "cpu.cfs_quota_us"),
            *_numbers(folder / "cpu.cfs_period_us"),
        ]
        if len(quota) == 2 and quota[0] > 0 and quota[1] > 0:
            most = min(most, quota[0] / quota[1])
    return max(1, int(most))


def cores_if_fewer(root: Path = _ROOT) -> int:
    """The cores of this process if they are fewer than the machine has; else 0: all of them."""
    usable = cores(root)
    return usable if usable < (os.cpu_count() or 1) else 0


def _allowed_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def _machine_memory(root: Path) -> int:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                return 1024 * int(line.split()[1])
    except OSError:  # not on Linux
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cgroups(root: Path, controller: str) -> Iterator[Path]:
    """The folders that limit this process: of its cgroup and of those around it, in v1 and v2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        top = root / "sys/fs/cgroup"
        mounts = [top / names, top / controller] if names else [top, top / "unified"]
        for mount in dict.fromkeys(mounts):
            folder = mount / path.lstrip("/")
            # In a container, the path may be one of the host: then only the top is there.
            yield from (each for each in (folder, *folder.parents) if each.is_relative_to(mount))


def _numbers(file: Path) -> list[int]:
    """The numbers in a file; none for one that is not there, or that sets no limit."""
    try:
        words = file.read_text().split()
    except OSError:
        return []
    return [] if "max" in words[:1] else [int(word) for word in words]
