# SPDX-License-Identifier: MIT
"""Tests of the filesystem as programs see it: the real command, a real mount, real system calls."""
