# SPDX-License-Identifier: MIT
"""Tests of the measurements: each one works, and its figures are computed correctly. They test no speed."""
