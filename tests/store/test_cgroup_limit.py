# SPDX-License-Identifier: MIT
"""The room of a memory cgroup, on made-up trees of both versions, and the pool that keeps within it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import pytest

from tests.core.samples import BIG, page
from tests.store.rig import get, push, put, running, trio_test
from zbudfs.core.codec import Codec
from zbudfs.core.errors import PoolFull
from zbudfs.core.units import PAGE_SIZE
from zbudfs.store.cgroup_limit import UNLIMITED, CgroupLimit
from zbudfs.store.memory import RESERVE_BYTES, STANDBY_BYTES
from zbudfs.store.page_store import PageStore
from zbudfs.store.status_area import Field

MIB = 1 << 20


def make(folder: Path, version: int, path: str, levels: dict[str, tuple[str, int, int]]) -> str:
    """Make a tree: (limit, used, inactive file pages) by path below its root. Return the folder that holds proc/."""
    (folder / "proc/self").mkdir(parents=True)
    line = f"4:memory,other:{path}\n0::/elsewhere\n" if version == 1 else f"1:name=systemd:/\n0::{path}\n"
    (folder / "proc/self/cgroup").write_bytes(os.fsencode(line))
    mount = "cgroup /tree cgroup rw,memory 0 0\n" if version == 1 else "cgroup2 /tree cgroup2 rw,nsdelegate 0 0\n"
    (folder / "proc/self/mounts").write_text(f"tmpfs / tmpfs rw 0 0\ncgroup /cpu cgroup rw,cpu 0 0\n{mount}")
    (folder / "tree").mkdir()
    for where, (limit, used, inactive) in levels.items():
        level = folder / "tree" / where
        level.mkdir(parents=True, exist_ok=True)
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
        (level / names[0]).write_text(f"{limit}\n")
        (level / names[1]).write_text(f"{used}\n")
        word = "total_inactive_file" if version == 1 else "inactive_file"
        (level / "memory.stat").write_text(f"cache 5\n{word} {inactive}\nunevictable 7\n")
    return str(folder)


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_level_counts(version: int, tmp_path: Path) -> None:
    """The cgroup itself or one above it sets the limit. Page cache that can be freed is room."""
    root = make(
        tmp_path, version, "/a/b", {"a": (str(100 * MIB), 70 * MIB, 0), "a/b": (str(90 * MIB), 80 * MIB, 15 * MIB)}
    )
    headroom = CgroupLimit(root)
    assert headroom.available_bytes() == 25 * MIB
    (tmp_path / "tree/a" / ("memory.usage_in_bytes" if version == 1 else "memory.current")).write_text(f"{99 * MIB}\n")
    assert headroom.available_bytes() == MIB, "it is read anew"
    (tmp_path / "tree/a" / ("memory.usage_in_bytes" if version == 1 else "memory.current")).write_text(f"{110 * MIB}\n")
    assert headroom.available_bytes() == -10 * MIB


@pytest.mark.parametrize(("version", "limit"), [(1, str((1 << 63) - 4096)), (2, "max")])
def test_without_a_limit(version: int, limit: str, tmp_path: Path) -> None:
    """Each version has its own word for no limit."""
    assert CgroupLimit(make(tmp_path, version, "/a", {"a": (limit, MIB, 0)})).available_bytes() == UNLIMITED


def test_without_a_tree(tmp_path: Path) -> None:
    """Without proc, without a memory controller, or with files that make no sense there is no limit."""
    assert CgroupLimit(str(tmp_path / "nothing")).available_bytes() == UNLIMITED
    root = make(tmp_path / "odd", 2, "/a", {"a": ("many", 1, 1)})
    assert CgroupLimit(root).available_bytes() == UNLIMITED
    (tmp_path / "odd/tree/a/memory.max").unlink()
    assert CgroupLimit(root).available_bytes() == UNLIMITED


ODD: Final = b"a\x0bb\x0cc\rd\x1ce\xc2\x85f\xe2\x80\xa8g\xff"


@pytest.mark.parametrize("version", [1, 2])
def test_names_that_users_choose(version: int, tmp_path: Path) -> None:
    """A mountpoint and a cgroup may have any name: none ends a line, and the limit is found."""
    odd = os.fsdecode(ODD)
    root = make(tmp_path, version, f"/{odd}", {odd: (str(9 * MIB), MIB, 0)})
    mounts = tmp_path / "proc/self/mounts"
    mounts.write_bytes(b"/dev/fuse /home/u/" + ODD + b" fuse rw 0 0\n" + mounts.read_bytes())
    assert CgroupLimit(root).available_bytes() == 8 * MIB


def test_in_a_namespace(tmp_path: Path) -> None:
    """If the path of the process is not in the mounted tree, its root is used."""
    root = make(tmp_path, 1, "/far/away", {"": (str(9 * MIB), MIB, 0)})
    assert CgroupLimit(root).available_bytes() == 8 * MIB


@trio_test
async def test_the_pool_keeps_within_it(tmp_path: Path) -> None:
    """Frames are populated as far as the cgroup has room. Then writes are refused with the reason, until there is more."""
    used = tmp_path / "tree/a/memory.current"
    root = make(tmp_path, 2, "/a", {"a": (str(200 * MIB), 0, 0)})

    store = PageStore(2048 * PAGE_SIZE, 1024, None, Codec())
    assert store.memory.cgroup_limit is None, "a store of its own has nobody's cgroup to think of"
    store.memory.check_room(1 << 60)
    store.memory.cgroup_limit = CgroupLimit(root)
    store.memory.status_area.fields[Field.STANDBY_READY] = 1
    used.write_text(str(200 * MIB - RESERVE_BYTES - MIB))
    async with running(store):
        assert store.statistics().pool_ready_bytes == 0, "a step of 2 MiB does not fit"
        with pytest.raises(PoolFull, match="gives the pool no memory"):
            await put(store, 0, page(0, BIG))
        assert "has room for 33 MiB more, and the daemon keeps 32 MiB" in store.reclaimer.warnings()[0]
        used.write_text(str(100 * MIB))
        push(1)
        await put(store, 0, page(0, BIG))
        assert await get(store, 0) == page(0, BIG)
        assert store.reclaimer.warnings() == []
        store.memory.status_area.fields[Field.STANDBY_READY] = 0
        used.write_text(str(200 * MIB - RESERVE_BYTES - STANDBY_BYTES))
        with pytest.raises(MemoryError, match="keeps 80 MiB"):
            store.memory.check_room(1)
