# SPDX-License-Identifier: MIT
"""The errors of the commands. `main` prints each as one line and returns an exit status."""

from __future__ import annotations

from collections.abc import Iterable

from zbudfs.core.errors import Failed


class CommandError(Failed):
    """The command cannot be carried out now. The text is one sentence for the user."""


class ConfigError(Exception):
    """The configuration cannot be used."""

    def __init__(self, problems: Iterable[str]) -> None:
        """Take one sentence for each problem."""
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class ConfigNameError(ConfigError):
    """The name of a configuration is malformed: a usage error."""

    def __init__(self, problem: str) -> None:
        """Take one sentence."""
        super().__init__([problem])
