# SPDX-License-Identifier: Apache-2.0
"""The training loop, its step and optimizer, and what is kept when a run fails."""
