# SPDX-License-Identifier: MIT
"""Processes and the system: how a daemon is started, mounted, protected, and what it says.

`settings`, `mountpoint`, `hardening` and `log` are the daemon's own and kept lean, since all that they import is
locked in memory. `launch` belongs to whoever starts a daemon and is never imported by it.
"""
