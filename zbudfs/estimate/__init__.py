# SPDX-License-Identifier: MIT
"""How some memory would compress and pair, found by doing it: samples of processes, files and core dumps. No daemon."""
