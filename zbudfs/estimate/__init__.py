# SPDX-License-Identifier: MIT
"""Estimates: samples of processes, files and core dumps are compressed and packed as the daemon would do. No daemon runs."""
