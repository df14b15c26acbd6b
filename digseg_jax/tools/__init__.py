# SPDX-License-Identifier: Apache-2.0
"""Programs beside the training: python -m digseg_jax.tools.NAME."""
