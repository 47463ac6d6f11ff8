"""How much memory there is, as different systems tell it."""

from pathlib import Path

import pytest

from overpaint_worker.free_memory import UNLIMITED, free_memory

GIB = 2**30


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    folder = tmp_path / "proc"
    (folder / "self").mkdir(parents=True)
    (folder / "meminfo").write_text(
        f"MemTotal: {16 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {8 * 2**20} kB\n"
    )
    return folder


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_without_a_limit_it_is_what_the_machine_has(proc: Path, tmp_path: Path) -> None:
    assert free_memory(proc, tmp_path / "none") == 8 * GIB


def test_a_system_that_says_nothing_limits_nothing(tmp_path: Path) -> None:
    assert free_memory(tmp_path, tmp_path / "none") == UNLIMITED


def test_a_container_has_what_its_limit_leaves_and_cached_files_are_free(proc: Path, tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    write(
        groups,
        memory__max=4 * GIB,
        memory__current=3 * GIB,
        memory__stat=f"anon 1\ninactive_file {GIB // 2}\nactive_file 7",
    )
    assert free_memory(proc, groups) == GIB + GIB // 2


def test_the_nearest_and_every_outer_group_limit_it(proc: Path, tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    (proc / "self" / "cgroup").write_text("0::/system.slice/overpaint-worker@0.service\n")
    write(groups / "system.slice" / "overpaint-worker@0.service", memory__max="max", memory__current=GIB)
    assert free_memory(proc, groups) == 8 * GIB
    write(groups / "system.slice", memory__max=3 * GIB, memory__current=GIB)
    assert free_memory(proc, groups) == 2 * GIB


def test_the_older_layout_of_control_groups_is_read_too(proc: Path, tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    (proc / "self" / "cgroup").write_text("5:cpu,cpuacct:/x\n7:memory:/docker/abc\n")
    write(
        groups / "memory" / "docker" / "abc",
        memory__limit_in_bytes=2 * GIB,
        memory__usage_in_bytes=GIB,
        memory__stat="total_inactive_file 0",
    )
    assert free_memory(proc, groups) == GIB
