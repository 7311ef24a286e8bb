# SPDX-License-Identifier: MIT
"""The parser class of all commands. An error is one line: what is wrong, the nearest right word, and the help to read."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any, NoReturn

from zbudfs.cli.arguments import Later
from zbudfs.cli.suggest import did_you_mean, nearest
from zbudfs.cli.values import error_about


def one_line(text: str) -> str:
    """Return the text of an error with unprintable characters escaped: it is one line and cannot control a terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all other errors of zbudfs. Options cannot be abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs |= {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(*args, **kwargs)
        # No option of zbudfs starts with a digit, so "-3,-1,1" is a value, as "-3" is.
        self._negative_number_matcher = re.compile(r"-\d")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the words. An unknown option is an error before its value can be mistaken for an argument."""
        args = sys.argv[1:] if args is None else list(args)
        for word in args:
            option = word.partition("=")[0]
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                break  # the words that follow are arguments, or belong to a command
            if re.fullmatch(r"--.+|-[^-\d.]", option, re.DOTALL) and option not in self._option_string_actions:
                known = [each for each in self._option_string_actions if each.startswith("--")]
                self.error(f"{option!r} is not an option of {self.prog}: {did_you_mean(option, known)}")
        parsed, extra = super().parse_known_args(args, namespace)
        if extra and self._subparsers is None:  # otherwise the parser above would name its own help
            self.error(f"this command does not take so many arguments: {' '.join(extra)}")
        return parsed, extra

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Convert a word to its value. The text of a ValueError becomes the message (`values.error_about`)."""
        try:
            return action.type(arg_string) if callable(action.type) else arg_string
        except ValueError as error:
            raise argparse.ArgumentError(action, error_about(arg_string, error)) from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Check that a word is one of the choices. For an unknown command, the error names the nearest one and its help."""
        if action.choices is None or value in action.choices:
            return
        known = list(map(str, action.choices))
        if isinstance(action, argparse._SubParsersAction):
            near = nearest(str(value), known)
            self._fail(
                f"{value!r} is not a command of {self.prog}: {did_you_mean(str(value), known)}",
                f"{self.prog} {near}" if near else self.prog,
            )
        self.error(f"{value!r} is not one of the words {', '.join(known)}")

    def error(self, message: str) -> NoReturn:
        """Print the usage error, and end with exit status 2."""
        self._fail(message, self.prog)

    def _fail(self, message: str, command: str) -> NoReturn:
        print(f"zbudfs: {one_line(message)} (see {command} --help)", file=sys.stderr)
        raise SystemExit(2)


Commands = argparse._SubParsersAction
"""The commands of a parser: the type that `add_subparsers` returns."""


def add_command(
    commands: Commands[OneLineParser], name: str, run: Later | None, summary: str, epilog: str
) -> OneLineParser:
    """Add a command that calls `run`, or that has commands of its own (None). Its help shows `epilog` below the options."""
    sub = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=epilog)
    if run is not None:
        sub.set_defaults(run=run)
    return sub
