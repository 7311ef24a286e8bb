# SPDX-License-Identifier: MIT
"""The encryption of blocks: data in the backing file cannot be read with the disk alone.

The cipher is AES-256 in XTS mode. Each block is one data unit, and its number is the tweak. docs/understand/secrecy.md has
the reasons. The key is random. It lies in the status area (store/status_area.py), in memory that is never swapped out. It
is overwritten when the mount ends.

The AES is OpenSSL's, in one of two ways with the same result. The first is the system's libcrypto, which one call uses for
many blocks (cipher.c). If that is not available, it is the library `cryptography`, which has an OpenSSL of its own. That
library makes a new context for each block, with the GIL held, and takes some megabytes more.

Only a daemon that encrypts imports this module, and it does so before the first fork, so that its processes share the memory.
"""

from collections.abc import Sequence
from typing import Final, Protocol

from zbudfs.core.units import PAGE_SIZE

KEY_BYTES: Final = 64
"""Two AES-256 keys: one for the content, one for the tweak."""

LIBRARY: Final = "libcrypto.so.3"
"""Name of the system's library, under which programs are linked to it."""

_TWEAK_BYTES: Final = 16


class Xts(Protocol):
    """AES-256-XTS of consecutive data units, each in one piece of memory. Safe for use by several threads."""

    def encrypt(self, number: int, pieces: Sequence[memoryview], target: memoryview, /) -> None:
        """Put the encrypted form of the data units from `number` on into `target`, one after the other."""

    def decrypt(self, number: int, pieces: Sequence[memoryview], /) -> None:
        """Decrypt the data units from `number` on in place."""


class LibraryXts:
    """Encryption by `cryptography`. It makes the key schedule for each block: its XTS cannot set another tweak."""

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        self._key = algorithms.AES(key)
        self._cipher = Cipher
        self._mode = modes.XTS

    def encrypt(self, number: int, pieces: Sequence[memoryview], target: memoryview, /) -> None:
        """Put the encrypted form of the data units from `number` on into `target`; see Xts."""
        at = 0
        for piece in pieces:
            made = self._cipher(self._key, self._mode(number.to_bytes(_TWEAK_BYTES, "little"))).encryptor()
            at += made.update_into(piece, target[at : at + len(piece)])
            number += 1

    def decrypt(self, number: int, pieces: Sequence[memoryview], /) -> None:
        """Decrypt the data units from `number` on in place; see Xts."""
        for piece in pieces:
            self._cipher(self._key, self._mode(number.to_bytes(_TWEAK_BYTES, "little"))).decryptor().update_into(
                piece, piece
            )
            number += 1


def best_xts(key: bytes) -> Xts:
    """Return the XTS of the system's libcrypto; that of `cryptography` if the library or the extension is missing."""
    try:
        from zbudfs.store._cipher import Xts as SystemXts

        return SystemXts(key, LIBRARY)
    except (ImportError, OSError):
        return LibraryXts(key)


class BlockCipher:
    """Encrypts and decrypts blocks with `key` of KEY_BYTES bytes. Safe for use by several threads."""

    def __init__(self, key: bytes) -> None:
        xts = best_xts(key)
        self.encrypt = xts.encrypt
        self.decrypt = xts.decrypt
        self.warm_up()

    def warm_up(self) -> None:
        """Use the cipher once, in the process that will use it, so that its code and data are in locked memory."""
        block = memoryview(bytearray(PAGE_SIZE))
        self.encrypt(0, [block], block)
        self.decrypt(0, [block])
        if any(block):
            raise MemoryError("decryption does not return the block that was encrypted: this memory is faulty")
