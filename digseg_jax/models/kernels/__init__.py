# SPDX-License-Identifier: Apache-2.0
"""Layers written for one kind of device; each computes the same as its plain counterpart."""
