# SPDX-License-Identifier: MIT
"""Tests of the package of memory, files, threads and tasks, with real ones."""
