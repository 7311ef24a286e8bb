# SPDX-License-Identifier: MIT
"""Encryption of blocks: what leaves RAM for the backing file is readable to nobody who has only the disk.

AES-256 in XTS mode, one data unit a block, the tweak is the block's number. docs/secrecy.md gives the reasons. The key
is random, lies on the board (store/board.py) in memory that is never swapped out, and is overwritten when the mount ends.

Only imported where it is used, and before the first fork: `cryptography` is some megabytes, which the processes share.
"""

from typing import Final

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from zbudfs.core.units import PAGE_SIZE

KEY_BYTES: Final = 64
"""Two AES-256 keys: one for the content, one for the tweak."""

_TWEAK_BYTES: Final = 16


class BlockCipher:
    """Encrypts and decrypts blocks with `key`, KEY_BYTES long. Safe for use by several threads.

    The key schedule is made anew for each block (4 us with it, measured), since XTS has no way to set another tweak.
    """

    def __init__(self, key: bytes) -> None:
        self._key = algorithms.AES(key)
        self.warm_up()

    def warm_up(self) -> None:
        """Use all of it once, so that it is present, and locked with the rest, in the process that will use it."""
        block = memoryview(bytearray(PAGE_SIZE))
        self.encrypt(0, block, block)
        self.decrypt(0, block)
        if any(block):
            raise MemoryError("a block that was encrypted does not come back: this memory cannot be trusted")

    def encrypt(self, block: int, content: memoryview, target: memoryview) -> None:
        """Put the encrypted form of `content` into `target`; each is 4096 bytes, and they may be the same."""
        self._cipher(block).encryptor().update_into(content, target)

    def decrypt(self, block: int, content: memoryview) -> None:
        """Decrypt a block of 4096 bytes in its place. With another key, or as another block, it becomes noise."""
        self._cipher(block).decryptor().update_into(content, content)

    def _cipher(self, block: int) -> Cipher[modes.XTS]:
        return Cipher(self._key, modes.XTS(block.to_bytes(_TWEAK_BYTES, "little")))
