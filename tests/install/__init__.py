# SPDX-License-Identifier: MIT
"""Tests of what a user gets: sdist, wheel, make install."""
