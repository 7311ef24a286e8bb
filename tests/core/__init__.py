# SPDX-License-Identifier: MIT
"""Tests of the pure package: no file, no task, no clock."""
