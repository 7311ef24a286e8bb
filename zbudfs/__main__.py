# SPDX-License-Identifier: MIT
"""The module that makes `python -m zbudfs` the command `zbudfs`."""

from zbudfs.cli.entry import main

raise SystemExit(main())
