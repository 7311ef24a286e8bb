# SPDX-License-Identifier: MIT
"""Pure decisions and data structures, without os, trio or a clock. All state lives in buffers that the caller provides."""
