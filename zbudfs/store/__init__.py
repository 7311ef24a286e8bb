# SPDX-License-Identifier: MIT
"""The page store: where the decisions of core/ meet memory, files, threads and tasks."""
