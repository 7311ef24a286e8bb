# SPDX-License-Identifier: MIT
"""The filesystem: it translates the kernel's requests for the page store. Importing it loads the libfuse shim first."""

from zbudfs.fuse import shim as shim
