# SPDX-License-Identifier: MIT
"""Tests of the pure room: no file, no task, no clock."""
