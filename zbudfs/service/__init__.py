# SPDX-License-Identifier: MIT
"""The daemon's processes: how they start, mount, protect themselves, hand over and report.

`settings`, `mountpoint`, `hardening` and `log` run in the daemon and import little, since all that they import is locked
in memory. `launch` runs in the command that starts a daemon; the daemon never imports it.
"""
