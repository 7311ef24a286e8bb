# SPDX-License-Identifier: MIT
"""Encryption of blocks: what leaves RAM for the backing file is readable to nobody who has only the disk.

AES-256 in XTS mode, one data unit a block, the tweak is the block's number. docs/secrecy.md gives the reasons. The key
is random, lies on the board (store/board.py) in memory that is never swapped out, and is overwritten when the mount ends.

The AES is OpenSSL's, in one of two ways, which give the same bytes: the system's libcrypto, called for many blocks at once
(cipher.c), or the library `cryptography`, which has an OpenSSL of its own, where the former is not to be had. That makes
its contexts anew for each block, under the interpreter's lock, and takes some megabytes more.

Only imported where it is used, and before the first fork, so that the processes share what it takes.
"""

from collections.abc import Sequence
from typing import Final, Protocol

from zbudfs.core.units import PAGE_SIZE

KEY_BYTES: Final = 64
"""Two AES-256 keys: one for the content, one for the tweak."""

LIBRARY: Final = "libcrypto.so.3"
"""The system's, by the name under which programs are linked to it."""

_TWEAK_BYTES: Final = 16


class Xts(Protocol):
    """AES-256-XTS of neighbouring data units, each a piece of memory. Safe for use by several threads."""

    def encrypt(self, number: int, pieces: Sequence[memoryview], target: memoryview, /) -> None:
        """Put the encrypted form of the data units `number` and on into `target`, one after the other."""

    def decrypt(self, number: int, pieces: Sequence[memoryview], /) -> None:
        """Decrypt the data units `number` and on in their places."""


class LibraryXts:
    """With `cryptography`. The key schedule is made anew for each block: its XTS has no way to set another tweak."""

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        self._key = algorithms.AES(key)
        self._cipher = Cipher
        self._mode = modes.XTS

    def encrypt(self, number: int, pieces: Sequence[memoryview], target: memoryview, /) -> None:
        """See Xts."""
        at = 0
        for piece in pieces:
            made = self._cipher(self._key, self._mode(number.to_bytes(_TWEAK_BYTES, "little"))).encryptor()
            at += made.update_into(piece, target[at : at + len(piece)])
            number += 1

    def decrypt(self, number: int, pieces: Sequence[memoryview], /) -> None:
        """See Xts."""
        for piece in pieces:
            self._cipher(self._key, self._mode(number.to_bytes(_TWEAK_BYTES, "little"))).decryptor().update_into(
                piece, piece
            )
            number += 1


def best_xts(key: bytes) -> Xts:
    """The system's libcrypto, or `cryptography` where that is not there or the extension was not built."""
    try:
        from zbudfs.store._cipher import Xts as SystemXts

        return SystemXts(key, LIBRARY)
    except (ImportError, OSError):
        return LibraryXts(key)


class BlockCipher:
    """Encrypts and decrypts blocks with `key`, KEY_BYTES long. Safe for use by several threads."""

    def __init__(self, key: bytes) -> None:
        xts = best_xts(key)
        self.encrypt = xts.encrypt
        self.decrypt = xts.decrypt
        self.warm_up()

    def warm_up(self) -> None:
        """Use all of it once, so that it is present, and locked with the rest, in the process that will use it."""
        block = memoryview(bytearray(PAGE_SIZE))
        self.encrypt(0, [block], block)
        self.decrypt(0, [block])
        if any(block):
            raise MemoryError("a block that was encrypted does not come back: this memory cannot be trusted")
