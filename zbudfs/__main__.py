# SPDX-License-Identifier: MIT
"""`python -m zbudfs` is the command `zbudfs`."""

from zbudfs.cli.entry import main

raise SystemExit(main())
