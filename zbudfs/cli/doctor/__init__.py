# SPDX-License-Identifier: MIT
"""`zbudfs doctor`: is this machine ready? One module for each thing that is looked at, and one that lists them all."""
