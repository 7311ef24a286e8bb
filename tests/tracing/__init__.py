# SPDX-License-Identifier: MIT
"""Tests of the room of memory, files, threads and tasks: real ones, all of them."""
