# SPDX-License-Identifier: MIT
"""What people type. Never imported by the daemon."""
