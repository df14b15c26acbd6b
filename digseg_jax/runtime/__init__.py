# SPDX-License-Identifier: Apache-2.0
"""Devices and processes: start-up settings, the mesh, collectives, preemption and profiling."""
