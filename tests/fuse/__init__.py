# SPDX-License-Identifier: MIT
"""The filesystem as programs see it: the real command, a real mount, real system calls."""
