# SPDX-License-Identifier: MIT
"""Tests of the documents: their commands, links, names and claims."""
