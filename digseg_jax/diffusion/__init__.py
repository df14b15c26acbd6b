# SPDX-License-Identifier: Apache-2.0
"""The forward process and its inversion: schedule, noise, timesteps, DDIM."""
