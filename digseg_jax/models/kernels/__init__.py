# SPDX-License-Identifier: Apache-2.0
"""Layers written for one kind of device; each computes what its plain counterpart does."""
