# SPDX-License-Identifier: MIT
"""`python -m zbudfs` is the command `zbudfs`."""

from zbudfs.cli.main import main

raise SystemExit(main())
