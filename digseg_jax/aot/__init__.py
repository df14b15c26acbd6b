# SPDX-License-Identifier: Apache-2.0
"""Ahead of time: the real programs compiled for devices that are not there, and what they need."""
