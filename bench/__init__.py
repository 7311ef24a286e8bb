# SPDX-License-Identifier: MIT
"""Measurements of the speed and the memory of zbudfs, with comparisons. See `python -m bench --help`."""
