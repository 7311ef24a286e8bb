# SPDX-License-Identifier: MIT
"""Parts that tests, measurements and campaigns share: needs of the machine, cgroups, failing disks, loads, page stores.

zbudfs  <-  kit  <-  bench  <-  scripts  <-  tests       a package imports only those on its left (tests/test_imports.py)
"""
