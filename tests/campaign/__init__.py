# SPDX-License-Identifier: MIT
"""Short forms of the campaigns in scripts/."""
