# SPDX-License-Identifier: Apache-2.0
"""The named data sets: their specifications, and readers of their published folders."""
