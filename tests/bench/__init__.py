# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: our figure and a reference's, measured in one run. `python -m tests.bench NAME`."""
