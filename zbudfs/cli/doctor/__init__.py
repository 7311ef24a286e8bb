# SPDX-License-Identifier: MIT
"""`zbudfs doctor` checks whether this machine is ready. Each module checks one subject, and `examine` lists all checks."""
