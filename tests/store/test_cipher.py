# SPDX-License-Identifier: MIT
"""Encryption: the example of the standard, the way through the backing file, and a store whose disk shows noise."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from tests.core.samples import BIG, HALF, RAW, page, pages
from tests.store.faulty import FaultyBacking
from tests.store.rig import block_of, get, put, quiet, running, trio_test
from tests.store.test_backing import Frames, read, write
from zbudfs.core.block_map import SEGMENT_BLOCKS
from zbudfs.core.codec import Codec
from zbudfs.core.errors import PageLost
from zbudfs.core.units import PAGE_SIZE
from zbudfs.store.arena import Arena
from zbudfs.store.backing import Backing
from zbudfs.store.cipher import KEY_BYTES, LIBRARY, BlockCipher, LibraryXts, Xts, best_xts
from zbudfs.store.page_store import PageStore
from zbudfs.store.status_area import STATUS_AREA_BYTES, StatusArea

KEY: Final = bytes(range(KEY_BYTES))
OUTGOING_BLOCKS: Final = 4


def encrypted(path: Path, key: bytes = KEY) -> FaultyBacking:
    """Return an encrypted backing file with a buffer of a few blocks."""
    backing = FaultyBacking(str(path))
    backing.encrypt(BlockCipher(key), memoryview(mmap.mmap(-1, OUTGOING_BLOCKS * PAGE_SIZE)))
    return backing


@contextlib.contextmanager
def opened(path: Path) -> Iterator[FaultyBacking]:
    """Open an encrypted file with two ready segments."""
    backing = encrypted(path)
    try:
        backing.make_ready(0, 2)
        yield backing
    finally:
        backing.close()


def system_xts(key: bytes) -> Xts:
    """Return the cipher with the system's libcrypto, which each machine with these tests has."""
    from zbudfs.store._cipher import Xts as SystemXts

    return SystemXts(key, LIBRARY)


both = pytest.mark.parametrize("kind", [system_xts, LibraryXts])


@both
def test_the_example_of_the_standard(kind: Callable[[bytes], Xts]) -> None:
    """IEEE 1619-2007, annex B, vector 10: XTS-AES-256, data unit 0xff, 512 bytes."""
    key = bytes.fromhex(
        "27182818284590452353602874713526624977572470936999595749669676273141592653589793238462643383279502884197169399"
        "375105820974944592"
    )
    plain = bytes(range(256)) * 2
    target = memoryview(bytearray(len(plain)))
    cipher = kind(key)
    cipher.encrypt(0xFF, [memoryview(plain)], target)
    assert target[:32].hex() == "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b"
    cipher.decrypt(0xFF, [target])
    assert target == plain


def cut(content: memoryview, size: int = PAGE_SIZE) -> list[memoryview]:
    """Return pieces of that size."""
    return [content[at : at + size] for at in range(0, len(content), size)]


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 63, 64, 65, 150])
@pytest.mark.parametrize("number", [0, 1, 255, (1 << 33) - 7, (1 << 64) - 1000])
def test_both_ways_give_the_same_bytes(count: int, number: int) -> None:
    """Each cipher decrypts the blocks of the other. Nothing beyond the target is written, and the source does not change."""
    key, plain = os.urandom(KEY_BYTES), os.urandom(count * PAGE_SIZE)
    one, other = system_xts(key), LibraryXts(key)
    targets = [memoryview(bytearray(len(plain) + PAGE_SIZE)) for _ in range(2)]
    for xts, target in zip((one, other), targets, strict=True):
        source = memoryview(bytearray(plain))
        xts.encrypt(number, cut(source), target)
        assert source == plain
    assert targets[0] == targets[1]
    assert not any(targets[0][len(plain) :])
    for xts, target in zip((other, one), targets, strict=True):
        xts.decrypt(number, cut(target[: len(plain)]))
        assert target[: len(plain)] == plain


def test_several_threads_at_once() -> None:
    """More readers than contexts, and writers, each with its own bytes: each gets its own bytes back."""
    xts, reference = system_xts(KEY), LibraryXts(KEY)
    plain = os.urandom(24 * PAGE_SIZE)
    encrypted_once = memoryview(bytearray(len(plain)))
    reference.encrypt(5, cut(memoryview(plain)), encrypted_once)

    def work(reading: bool) -> bool:
        for _ in range(60):
            target = memoryview(bytearray(encrypted_once if reading else plain))
            if reading:
                xts.decrypt(5, cut(target))
            else:
                xts.encrypt(5, cut(target), target)
            if target != (plain if reading else encrypted_once):
                return False
        return True

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(work, [True, True, True, True, False, False]))


def test_refusals_of_the_system_cipher() -> None:
    """Wrong sizes, a target that is too small, read-only memory and another library are refused, and nothing is done."""
    from zbudfs.store._cipher import Xts as SystemXts

    xts, page_of_zeros = system_xts(KEY), memoryview(bytearray(PAGE_SIZE))
    with pytest.raises(ValueError, match="a key of 32 bytes instead of 64"):
        SystemXts(KEY[:32], LIBRARY)
    with pytest.raises(ValueError, match="a data unit of 15 bytes"):
        xts.decrypt(0, [page_of_zeros, page_of_zeros[:15]])
    with pytest.raises(ValueError, match="8192 bytes do not fit into 4096"):
        xts.encrypt(0, [page_of_zeros] * 2, page_of_zeros)
    with pytest.raises(BufferError):
        xts.decrypt(0, [memoryview(bytes(PAGE_SIZE))])
    with pytest.raises(TypeError):
        xts.decrypt(0, [page_of_zeros, 7])  # type: ignore[list-item]
    with pytest.raises(OverflowError):
        xts.decrypt(-1, [page_of_zeros])
    assert not any(page_of_zeros)
    for name in ("libno-such-thing.so.1", "libm.so.6"):
        with pytest.raises(OSError, match="is not there, or not usable"):
            SystemXts(KEY, name)
    assert isinstance(best_xts(KEY), SystemXts)


def test_without_the_system_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without libcrypto the other library is used, with the same bytes."""
    here, there = memoryview(bytearray(PAGE_SIZE)), memoryview(bytearray(PAGE_SIZE))
    BlockCipher(KEY).encrypt(3, [here], there)
    monkeypatch.setattr("zbudfs.store.cipher.LIBRARY", "libno-such-thing.so.1")
    assert isinstance(best_xts(KEY), LibraryXts)
    BlockCipher(KEY).decrypt(3, [there])
    assert there == here


def test_written_blocks_are_read_and_not_seen(tmp_path: Path) -> None:
    """More blocks than the buffer holds are read back, in runs and alone, and the file shows none of them."""
    content = pages(11, BIG)
    with opened(tmp_path / "backing") as backing:
        frames = Frames(11)
        backing.write_blocks(SEGMENT_BLOCKS - 5, frames.fill(content))
        assert frames.content == content, "what is written stays in RAM as it is"
        assert read(backing, SEGMENT_BLOCKS - 5, 11) == content
        assert b"".join(read(backing, SEGMENT_BLOCKS - 5 + at, 1) for at in range(11)) == content
        on_disk = (tmp_path / "backing").read_bytes()
        start = (SEGMENT_BLOCKS - 5) * PAGE_SIZE
        there = on_disk[start : start + len(content)]
        for at in range(0, len(content), 16):
            assert there[at : at + 16] != content[at : at + 16]
        assert not any(page(number, BIG)[:32] in on_disk for number in range(11))


def test_equal_blocks_look_different(tmp_path: Path) -> None:
    """The number of a block is part of its encryption: equal blocks look different, and a moved one is noise."""
    with opened(tmp_path / "backing") as backing:
        write(backing, 3, page(1) * 2)
        with (tmp_path / "backing").open("r+b") as file:
            file.seek(3 * PAGE_SIZE)
            one, other = file.read(PAGE_SIZE), file.read(PAGE_SIZE)
            assert one != other
            file.seek(5 * PAGE_SIZE)
            file.write(one)
        assert read(backing, 3, 2) == page(1) * 2
        assert read(backing, 5, 1) != page(1)


def test_only_with_the_key(tmp_path: Path) -> None:
    """Another process with the same key can read the file. With another key there is noise."""
    with opened(tmp_path / "backing") as backing:
        write(backing, 3, page(1))
        other = Backing(str(tmp_path / "backing"), os.dup(backing.fileno()))
        outgoing = memoryview(mmap.mmap(-1, PAGE_SIZE))
        other.encrypt(BlockCipher(KEY), outgoing)
        assert read(other, 3, 1) == page(1)
        other.encrypt(BlockCipher(KEY[::-1]), outgoing)
        assert read(other, 3, 1) != page(1)
        os.close(other.fileno())


def test_a_disk_that_takes_less_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a write takes a part of the buffer, the rest follows at the right places."""
    real = os.pwritev
    sizes = []

    def less(fd: int, views: list[memoryview], *rest: int) -> int:
        sizes.append(real(fd, [views[0][: max(PAGE_SIZE, len(views[0]) // 2 // PAGE_SIZE * PAGE_SIZE)]], *rest))
        return sizes[-1]

    with opened(tmp_path / "backing") as backing:
        monkeypatch.setattr(os, "pwritev", less)
        write(backing, 7, pages(9, BIG))
        monkeypatch.undo()
        assert read(backing, 7, 9) == pages(9, BIG)
    assert sizes == [2 * PAGE_SIZE, PAGE_SIZE, PAGE_SIZE] * 2 + [PAGE_SIZE]


@trio_test
async def test_a_store_with_an_encrypted_disk(tmp_path: Path) -> None:
    """Pages of all kinds come back. A block with one flipped bit is lost, and never wrong."""
    backing = encrypted(tmp_path / "backing")
    store = PageStore(512 * PAGE_SIZE, 64, backing, Codec())
    async with running(store):
        sizes = (HALF, BIG, RAW)
        for number in range(12):
            await put(store, number, page(number, sizes[number % 3]))
        for number in range(100, 200):
            await put(store, number, page(number, BIG))
        await quiet(store)
        assert await get(store, 3, 3) == b"".join(page(number, sizes[number % 3]) for number in (3, 4, 5))
        for number in (6, 7, 8):
            with (tmp_path / "backing").open("r+b") as file:
                # The content is at the start, or at the end, of the block: one bit in each 256 bytes.
                for at in range(block_of(store, number) * PAGE_SIZE, (block_of(store, number) + 1) * PAGE_SIZE, 256):
                    file.seek(at)
                    byte = file.read(1)[0]
                    file.seek(at)
                    file.write(bytes([byte ^ 4]))
            with pytest.raises(PageLost):
                await get(store, number)
        await put(store, 6, page(99))
        assert await get(store, 6) == page(99)
        await quiet(store)


def test_the_key_on_the_status_area() -> None:
    """The key is made once, stays for later processes, differs between boards, and can be erased."""
    arena = Arena("board", STATUS_AREA_BYTES)
    area = StatusArea(arena)
    assert not any(arena.view[3 << 10 : 4 << 10])
    key = area.key(KEY_BYTES)
    assert len(set(key)) > 16
    assert StatusArea(arena).key(KEY_BYTES) == area.key(KEY_BYTES) == key
    assert StatusArea(Arena("board", STATUS_AREA_BYTES)).key(KEY_BYTES) != key
    area.save_init(b"\xff" * 512)
    area.save_error("x" * 10_000)
    assert area.key(KEY_BYTES) == key
    assert key in bytes(arena.view)
    area.forget_key()
    assert key[:8] not in bytes(arena.view)
    assert area.init() == b"\xff" * 512
