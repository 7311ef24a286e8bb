# SPDX-License-Identifier: MIT
"""Traces: recording what is asked of a mount, looking at it, and replaying it against a store. Never in the daemon."""
