# SPDX-License-Identifier: MIT
"""Tests of the things that a user gets: sdist, wheel, `make install`, and the Debian package."""
