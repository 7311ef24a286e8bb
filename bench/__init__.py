# SPDX-License-Identifier: MIT
"""How fast zbudfs is, what it takes, and against what: `python -m bench --help`."""
