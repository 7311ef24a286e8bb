# SPDX-License-Identifier: MIT
"""swapoff runs only if the pages fit. tests/cli/test_swap.py has real swap."""

from pathlib import Path

import pytest

from zbudfs.swap.attach import attach
from zbudfs.swap.detach import MARGIN_BYTES, available_bytes, check_room, detach
from zbudfs.swap.loop import Swap, SwapError

MIB = 1 << 20


def swap(size_mib: int, used_mib: int) -> Swap:
    """Return a made-up swap."""
    return Swap("/dev/x", size_mib * MIB, used_mib * MIB, 0)


@pytest.mark.parametrize(
    ("used_mib", "others", "available_mib", "fits"),
    [
        (0, [], 0, True),
        (100, [], 164, True),
        (100, [], 163, False),
        (100, [swap(50, 0)], 114, True),
        (100, [swap(50, 1)], 114, False),
        (100, [swap(50, 50), swap(30, 10)], 144, True),
    ],
)
def test_room_is_counted(used_mib: int, others: list[Swap], available_mib: int, fits: bool) -> None:
    """The used swap and a margin must fit into RAM and the free room of other swap."""
    assert MARGIN_BYTES == 64 * MIB
    if fits:
        check_room([swap(1000, used_mib)], others, available_mib * MIB)
        return
    with pytest.raises(SwapError, match=f"not enough memory for swapoff: {used_mib} MiB would come back") as caught:
        check_room([swap(1000, used_mib)], others, available_mib * MIB)
    assert f"only {available_mib} MiB of RAM" in str(caught.value)


def test_several_swaps_on_one_mount_add_up() -> None:
    """The pages of all swaps on one mount must fit."""
    with pytest.raises(SwapError, match="200 MiB would come back"):
        check_room([swap(1000, 100), swap(1000, 100)], [], 200 * MIB)


def test_available_memory_is_read(tmp_path: Path) -> None:
    """MemAvailable is in KiB. A kernel without it gives no estimate."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   1234 kB\n")
    assert available_bytes(str(tmp_path)) == 1234 * 1024
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\n")
    with pytest.raises(SwapError, match="cannot tell whether swapoff would fit"):
        available_bytes(str(tmp_path))


def test_detaching_where_memory_is_short_changes_nothing(tmp_path: Path) -> None:
    """The refusal comes before any change."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 1000 kB\n")
    (tmp_path / "proc/swaps").write_text("Filename Type Size Used Priority\n/dev/loop99 partition 999999 500000 5\n")
    loop = tmp_path / "sys/block/loop99/loop"
    loop.mkdir(parents=True)
    (loop / "backing_file").write_text("/mnt/z/swapfile\n")
    (loop / "dio").write_text("1\n")
    with pytest.raises(SwapError, match="nothing was changed"):
        detach([("/mnt/z", None)], root=str(tmp_path))
    assert detach([("/mnt/other", None)], root=str(tmp_path)) == []


def test_attaching_where_nothing_is_mounted(tmp_path: Path) -> None:
    """A directory without a swapfile is refused."""
    with pytest.raises(SwapError, match="there is no swapfile in"):
        attach(str(tmp_path))
    (tmp_path / "swapfile").mkdir()
    with pytest.raises(SwapError, match="there is no swapfile in"):
        attach(str(tmp_path))
