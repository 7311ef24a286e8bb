# SPDX-License-Identifier: MIT
"""Tests of traces: the file, the replay and the summary."""
