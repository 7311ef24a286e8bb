# SPDX-License-Identifier: MIT
"""The command line of the measurements.

    python -m bench storm                    one of them, with options of its own: python -m bench storm --help
    python -m bench all --json > full.json   all of them
    python -m bench show full.json           the tables of results that were kept
    python -m bench document full.json       the same into docs/performance.md, each between its markers

Tables go to stdout, what is being done to stderr. Exit status: 0 done, 1 failed, 2 asked for wrongly.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, Final

from bench import document, fio, machine, memory, packing, recovery, size, store, storm, strangers
from bench.kit import BenchError, Benchmark, Options, progress
from bench.table import Table

BENCHMARKS: Final = (
    storm.BENCHMARK,
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
    """Do what was asked for; the exit status."""
    options = build_parser().parse_args(words)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        status: int = options.run(options)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; everything was taken down", file=sys.stderr)
        return 130
    return status


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def build_parser() -> argparse.ArgumentParser:
    """The parser; what it gives has the function to call as `run`."""
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
    sub = commands.add_parser("all", help="all of them, as they are without options", allow_abbrev=False)
    sub.set_defaults(run=_run, names=[benchmark.name for benchmark in BENCHMARKS])
    _add_common(sub)
    for name, run, summary in (
        ("show", _show, "print the tables of results that were kept with --json"),
        ("document", _document, "put them into docs/performance.md"),
    ):
        sub = commands.add_parser(name, help=summary, allow_abbrev=False)
        sub.set_defaults(run=run)
        sub.add_argument(
            "results", nargs="+", type=Path, metavar="FILE", help="what --json printed; the last to tell of a name wins"
        )
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rounds", type=_at_least_one, default=ROUNDS, metavar="N", help="rounds of each (default: %(default)s)"
    )
    parser.add_argument(
        "--short", action="store_true", help="small and quick, one round: shows that it works, not how fast it is"
    )
    parser.add_argument("--json", action="store_true", help="print every value of every round")
    parser.add_argument(
        "--dir",
        default="/var/tmp",
        metavar="DIR",
        help="where disk files are made: on the disk to be measured (default: %(default)s)",
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
        # For `all`: the options that only this one knows, as they are when nothing is said.
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
    """What a measurement gives; where it cannot be made, a table that says why."""
    if reason := benchmark.why_not():
        return [Table(benchmark.summary, [], notes=[f"Skipped: {reason}."])]
    progress(f"{benchmark.name} ...")
    return benchmark.run(options)


def _load(files: list[Path]) -> tuple[str, dict[str, list[Table]]]:
    """The machine and the tables by name from files that --json printed. Raises BenchError."""
    found: dict[str, list[Table]] = {}
    where = ""
    for file in files:
        try:
            results = json.loads(file.read_text())
            where = str(results["machine"])
            for name, tables in results["benchmarks"].items():
                found[name] = [Table.of_object(table) for table in tables]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BenchError(f"{file} is not what --json prints: {error}") from None
    return where, found


def _show(options: Options) -> int:
    where, found = _load(options.results)
    print("\n\n".join([*(table.as_text() for tables in found.values() for table in tables), where]))
    return 0


def _document(options: Options) -> int:
    where, found = _load(options.results)
    for name in document.rewrite(where, found):
        print(f"{document.PAGE.name}: {name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
