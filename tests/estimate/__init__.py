# SPDX-License-Identifier: MIT
"""Tests of the estimate, with real processes and files."""
