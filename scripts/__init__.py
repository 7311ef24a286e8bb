# SPDX-License-Identifier: MIT
"""Programs for the development of zbudfs, which are not installed: campaigns, packages, checks and the demonstration."""
