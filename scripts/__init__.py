# SPDX-License-Identifier: MIT
"""Programs around zbudfs that are not part of it: the demonstration, and what tests and demonstration share."""
