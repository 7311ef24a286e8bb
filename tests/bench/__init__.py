# SPDX-License-Identifier: MIT
"""Tests of the measurements: that each still works, and that what it tells is worked out rightly. Not how fast anything is."""
