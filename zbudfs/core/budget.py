# SPDX-License-Identifier: MIT
"""The budget of bytes that may be written to the backing file: a token bucket that spares flash. Callers pass the time.

    bucket    holds one day's allowance at most, and is full when the budget is first set
    refill    is continuous, an allowance a day
    spend     every write to the backing file, for any reason

So no period of a day sees more than two allowances, and in the long run there is one a day.
"""

from typing import Final

DAY_SECONDS: Final = 86400


class Budget:
    """A budget of `bytes_per_day` (0: no limit). Times are seconds of any clock that does not go back."""

    def __init__(self) -> None:
        self.bytes_per_day = 0
        self._left = 0.0
        self._at = 0.0

    def set(self, bytes_per_day: int, now: float, left_bytes: int | None = None) -> None:
        """Change the budget. Bytes of today's allowance that were spent stay spent, unless `left_bytes` says what is left."""
        spent = self.used_bytes(now)
        self.bytes_per_day = bytes_per_day
        self._left = float(max(0, bytes_per_day - spent) if left_bytes is None else min(left_bytes, bytes_per_day))
        self._at = now

    def left_bytes(self, now: float) -> int:
        """Return the bytes that may be written at time `now`; 0 if there is no limit."""
        self._refill(now)
        return int(self._left)

    def used_bytes(self, now: float) -> int:
        """Return the bytes of the allowance that are spent and not refilled yet."""
        return self.bytes_per_day - self.left_bytes(now)

    def seconds_until_full(self, now: float) -> int:
        """Return the seconds until the allowance is whole again, rounded up."""
        used = self.used_bytes(now)
        return -(-used * DAY_SECONDS // self.bytes_per_day) if used else 0

    def allows(self, size_bytes: int, now: float) -> bool:
        """Return whether `size_bytes` may be written. A larger write than the allowance may when the allowance is whole."""
        return not self.bytes_per_day or self.left_bytes(now) >= min(size_bytes, self.bytes_per_day)

    def spend(self, size_bytes: int, now: float) -> None:
        """Take `size_bytes`, which are being written, from the allowance."""
        if self.bytes_per_day:
            self._refill(now)
            self._left = max(0.0, self._left - size_bytes)

    def give_back(self, size_bytes: int, now: float) -> None:
        """Return `size_bytes` that were spent but not written to the allowance."""
        if self.bytes_per_day:
            self._refill(now)
            self._left = min(float(self.bytes_per_day), self._left + size_bytes)

    def _refill(self, now: float) -> None:
        if now > self._at:
            self._left = min(
                float(self.bytes_per_day), self._left + (now - self._at) * self.bytes_per_day / DAY_SECONDS
            )
            self._at = now
