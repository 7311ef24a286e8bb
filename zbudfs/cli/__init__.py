# SPDX-License-Identifier: MIT
"""The commands of `zbudfs`, `mount.fuse.zbudfs` and `umount.fuse.zbudfs`. The daemon never imports this package."""
