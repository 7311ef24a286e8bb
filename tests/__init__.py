# SPDX-License-Identifier: MIT
"""Tests, in rooms of the same names as the package."""
