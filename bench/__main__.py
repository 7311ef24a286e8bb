# SPDX-License-Identifier: MIT
"""The command line of the measurements.

    python -m bench storm                    run one measurement; for its options, see python -m bench storm --help
    python -m bench all --json > full.json   run all measurements, and keep the results
    python -m bench show full.json           print the tables of kept results
    python -m bench document full.json       put the tables into docs/evidence/performance.md, and draw its picture

Tables go to stdout, and progress to stderr. The exit status is 0 for success, 1 for a failure, and 2 for a usage error.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, Final

from bench import document, fio, machine, memory, packing, real, recovery, size, store, storm, strangers
from bench.kit import Benchmark, Options, progress
from bench.table import Table
from kit.programs import KitError

BENCHMARKS: Final = (
    storm.BENCHMARK,
    real.BENCHMARK,
    fio.BENCHMARK,
    store.BENCHMARK,
    memory.BENCHMARK,
    size.BENCHMARK,
    packing.BENCHMARK,
    recovery.BENCHMARK,
    strangers.BENCHMARK,
)
ROUNDS: Final = 5


def main(words: list[str] | None = None) -> int:
    """Run the command line `words`, by default that of the process, and return the exit status."""
    options = build_parser().parse_args(words)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        status: int = options.run(options)
    except KitError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; all mounts and disks were removed", file=sys.stderr)
        return 130
    return status


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def build_parser() -> argparse.ArgumentParser:
    """Return the parser. Its `run` is the function to call."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="measurements", metavar="NAME", required=True)
    for benchmark in BENCHMARKS:
        sub = commands.add_parser(benchmark.name, help=benchmark.summary, allow_abbrev=False)
        sub.set_defaults(run=_run, names=[benchmark.name])
        benchmark.add_options(sub)
        _add_common(sub)
    sub = commands.add_parser("all", help="all measurements, with their default options", allow_abbrev=False)
    sub.set_defaults(run=_run, names=[benchmark.name for benchmark in BENCHMARKS])
    _add_common(sub)
    for name, run, summary in (
        ("show", _show, "print the tables of results that --json printed"),
        (
            "document",
            _document,
            "put the tables into docs/evidence/performance.md, and draw the picture of real programs",
        ),
    ):
        sub = commands.add_parser(name, help=summary, allow_abbrev=False)
        sub.set_defaults(run=run)
        sub.add_argument(
            "results",
            nargs="+",
            type=Path,
            metavar="FILE",
            help="results that --json printed; of several files with the same measurement, the last one counts",
        )
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rounds", type=_at_least_one, default=ROUNDS, metavar="N", help="rounds of each row (default: %(default)s)"
    )
    parser.add_argument(
        "--short", action="store_true", help="run one small round: it shows that the measurement works, and no speed"
    )
    parser.add_argument("--json", action="store_true", help="print every value of every round")
    parser.add_argument(
        "--dir",
        default="/var/tmp",
        metavar="DIR",
        help="folder for files, on the disk that is measured (default: %(default)s)",
    )


def _at_least_one(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rounds: write 1 or more")
    return number


def _run(options: Options) -> int:
    results: dict[str, Any] = {"machine": machine.describe(Path(options.dir)), "benchmarks": {}}
    parser = build_parser()
    if options.short:
        options.rounds = 1
    for name in options.names:
        (benchmark,) = (each for each in BENCHMARKS if each.name == name)
        # `all` has only the common options, so the measurement's own options get their defaults here.
        own = vars(parser.parse_args([name])) | vars(options)
        tables = _tables(benchmark, argparse.Namespace(**own))
        results["benchmarks"][name] = [table.as_object() for table in tables]
        if not options.json:
            print(
                "\n\n".join([f"{name}: {benchmark.summary}", *(table.as_text() for table in tables)]),
                end="\n\n",
                flush=True,
            )
    if options.json:
        print(json.dumps(results))
    else:
        print(results["machine"])
    return 0


def _tables(benchmark: Benchmark, options: Options) -> list[Table]:
    """Return the tables of a measurement, or a table that says why it cannot run here."""
    if reason := benchmark.why_not():
        return [Table(benchmark.summary, [], notes=[f"Skipped: {reason}."])]
    progress(f"{benchmark.name} ...")
    return benchmark.run(options)


def _load(files: list[Path]) -> tuple[str, dict[str, list[Table]]]:
    """Return the description of the machine and the tables by measurement, from files of --json. Raises KitError."""
    found: dict[str, list[Table]] = {}
    where = ""
    for file in files:
        try:
            results = json.loads(file.read_text())
            where = str(results["machine"])
            for name, tables in results["benchmarks"].items():
                found[name] = [Table.of_object(table) for table in tables]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise KitError(f"{file} is not a file of results: write one that --json printed: {error}") from None
    return where, found


def _show(options: Options) -> int:
    where, found = _load(options.results)
    print("\n\n".join([*(table.as_text() for tables in found.values() for table in tables), where]))
    return 0


def _document(options: Options) -> int:
    where, found = _load(options.results)
    for name in document.rewrite(where, found):
        print(f"{document.PAGE.name}: {name}")
    if (drawn := real.picture(found.get(real.BENCHMARK.name, []))) is not None:
        real.PICTURE.write_text(drawn)
        print(real.PICTURE.name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
