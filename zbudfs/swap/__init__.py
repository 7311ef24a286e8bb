# SPDX-License-Identifier: MIT
"""Swap on a mounted zbudfs: loop devices, mkswap, swapon, and the way back.

All of it happens outside the daemon, with the programs of util-linux; the daemon only sees its file being used.
"""
