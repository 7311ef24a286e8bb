# SPDX-License-Identifier: MIT
"""The page store: it carries out the decisions of core/ with memory, files, threads and tasks."""
