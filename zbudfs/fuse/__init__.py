# SPDX-License-Identifier: MIT
"""The filesystem: what the kernel asks, translated for the page store. Importing this loads the libfuse shim first."""

from zbudfs.fuse import shim as shim
