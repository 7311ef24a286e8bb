# SPDX-License-Identifier: MIT
"""A SQLite database that fits into its cache.

database.py make FILE MIB
database.py use FILE MIB

`use` is one transaction. It reads the table in order, looks rows up through an index and changes them, checks every row, and
rolls back. Until then, the changes stay in the cache, so the file is the same for the next run.
"""

from __future__ import annotations

import sqlite3
import sys
from typing import Final

from bench.programs.records import count_wrong, cut, report, uses

ROW_BYTES: Final = 560
"""Bytes of a row and its entry in the index, in the file. Measured."""
USES_PER_MIB: Final = 16
_SAME: Final = "SELECT name, orders, used FROM customers WHERE mail = ?"


def _count(mib: int) -> int:
    return mib * (1 << 20) // ROW_BYTES


def _mail(number: int) -> str:
    return f"{cut(~number & 0xFFFFFFFF, 16).replace(' ', '.')}{number}"


def make(file: str, mib: int) -> int:
    """Fill a new database, and return the exit status."""
    base = sqlite3.connect(file)
    base.execute("PRAGMA journal_mode = OFF")
    base.execute("PRAGMA synchronous = OFF")
    base.execute("CREATE TABLE customers (number INTEGER PRIMARY KEY, name TEXT, mail TEXT, orders TEXT, used INTEGER)")
    rows = ((number, cut(number, 24), _mail(number), cut(number << 1, 400), 0) for number in range(_count(mib)))
    base.executemany("INSERT INTO customers VALUES (?, ?, ?, ?, ?)", rows)
    base.execute("CREATE INDEX by_mail ON customers (mail)")
    base.commit()
    base.close()
    return report(_count(mib), 0)


def use(file: str, mib: int) -> int:
    """Read, change and check the rows, and return the exit status."""
    base = sqlite3.connect(file, isolation_level=None)
    base.execute(f"PRAGMA cache_size = -{mib * 1024 * 3 // 2}")
    base.execute("PRAGMA cache_spill = OFF")
    base.execute("PRAGMA journal_mode = MEMORY")
    base.execute("BEGIN")
    count, used = _count(mib), [0] * _count(mib)
    (found,) = base.execute("SELECT count(name) FROM customers").fetchone()
    bad = int(found != count)
    for number in uses(mib * USES_PER_MIB, count):
        mail = _mail(number)
        bad += base.execute(_SAME, (mail,)).fetchone() != (cut(number, 24), cut(number << 1, 400), used[number])
        base.execute("UPDATE customers SET used = used + 1 WHERE mail = ?", (mail,))
        used[number] += 1
    rows = base.execute("SELECT number, name, mail, orders, used FROM customers ORDER BY number")

    def is_right(number: int) -> bool:
        row = (number, cut(number, 24), _mail(number), cut(number << 1, 400), used[number])
        return bool(next(rows, None) == row)

    bad += count_wrong(count, is_right)
    rows.close()
    base.execute("ROLLBACK")
    base.close()
    return report(count, bad)


def main(argv: list[str]) -> int:
    """Run `make` or `use`, and return the exit status."""
    return {"make": make, "use": use}[argv[1]](argv[2], int(argv[3]))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
