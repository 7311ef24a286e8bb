# SPDX-License-Identifier: MIT
"""Pure decisions and data structures: no os, no trio, no clock. Everything lives in buffers that the caller gives."""
