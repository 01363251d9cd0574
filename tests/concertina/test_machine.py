"""What a process may use, by the files of cgroups as kernels and container runtimes make them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from concertina import machine
from concertina.machine import cores, cores_if_fewer, memory_bytes, share_of_memory

GIB = 1024**3
UNLIMITED_V1 = 9223372036854771712


@pytest.fixture(autouse=True)
def node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The root of a large machine: 64 cores, 256 GiB."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    write(tmp_path, "proc/meminfo", f"MemTotal:       {256 * GIB // 1024} kB\nMemFree: 1 kB\n")
    return tmp_path


def write(root: Path, name: str, content: object) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{content}\n")


def test_without_cgroups_it_is_the_machine(node: Path) -> None:
    assert (memory_bytes(node), cores(node), cores_if_fewer(node)) == (256 * GIB, 64, 0)


def test_a_container_of_version_2(node: Path) -> None:
    """In a namespace of its own, as Docker and Kubernetes make it."""
    write(node, "proc/self/cgroup", "0::/")
    write(node, "sys/fs/cgroup/memory.max", 6 * GIB)
    write(node, "sys/fs/cgroup/cpu.max", "200000 100000")
    assert (memory_bytes(node), cores(node), cores_if_fewer(node)) == (6 * GIB, 2, 2)


def test_a_share_of_a_small_container_is_small(node: Path) -> None:
    assert share_of_memory(GIB, root=node) == GIB
    assert share_of_memory(GIB, 64, node) == GIB // 2
    write(node, "proc/self/cgroup", "0::/")
    write(node, "sys/fs/cgroup/memory.max", GIB // 2)
    assert share_of_memory(GIB, root=node) == GIB // 16
    assert share_of_memory(GIB, 2, node) == GIB // 32


def test_the_smallest_limit_of_all_cgroups_around_counts(node: Path) -> None:
    write(node, "proc/self/cgroup", "0::/system.slice/some.service/inner")
    top = "sys/fs/cgroup/system.slice"
    write(node, f"{top}/memory.max", 8 * GIB)
    write(node, f"{top}/cpu.max", "max 100000")
    write(node, f"{top}/some.service/memory.max", "max")
    write(node, f"{top}/some.service/cpu.max", "350000 100000")
    write(node, f"{top}/some.service/inner/memory.max", 12 * GIB)
    assert (memory_bytes(node), cores(node)) == (8 * GIB, 3)


def test_a_container_of_version_1_whose_path_is_of_the_host(node: Path) -> None:
    write(
        node,
        "proc/self/cgroup",
        "9:name=systemd:/x\n4:memory:/docker/0123\n2:cpu,cpuacct:/docker/0123",
    )
    write(node, "sys/fs/cgroup/memory/memory.limit_in_bytes", 6 * GIB)
    write(node, "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", 150000)
    write(node, "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", 100000)
    assert (memory_bytes(node), cores(node)) == (6 * GIB, 1)


def test_a_cgroup_of_version_1_on_the_host(node: Path) -> None:
    write(node, "proc/self/cgroup", "4:memory:/a/b\n2:cpu:/a\n0::/")
    write(node, "sys/fs/cgroup/memory/memory.limit_in_bytes", UNLIMITED_V1)
    write(node, "sys/fs/cgroup/memory/a/memory.limit_in_bytes", 4 * GIB)
    write(node, "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", UNLIMITED_V1)
    write(node, "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", 50000)
    write(node, "sys/fs/cgroup/cpu/a/cpu.cfs_period_us", 100000)
    assert (memory_bytes(node), cores(node)) == (4 * GIB, 1)


def test_no_limit_is_none(node: Path) -> None:
    write(node, "proc/self/cgroup", "4:memory:/\n2:cpu:/\n0::/")
    write(node, "sys/fs/cgroup/memory/memory.limit_in_bytes", UNLIMITED_V1)
    write(node, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", -1)
    write(node, "sys/fs/cgroup/cpu/cpu.cfs_period_us", 100000)
    write(node, "sys/fs/cgroup/memory.max", "max")
    write(node, "sys/fs/cgroup/cpu.max", "max 100000")
    assert (memory_bytes(node), cores(node), cores_if_fewer(node)) == (256 * GIB, 64, 0)


def test_the_affinity_counts_too(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert (cores(node), cores_if_fewer(node)) == (2, 2)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores(node) == 64


def test_this_machine_has_some_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 1 <= cores() <= (os.cpu_count() or 1)
    assert 2**26 < memory_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine.cores_if_fewer() in (0, cores())
