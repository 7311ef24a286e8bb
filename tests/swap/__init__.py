# SPDX-License-Identifier: MIT
"""Tests of zbudfs.swap."""
