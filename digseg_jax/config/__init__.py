# SPDX-License-Identifier: Apache-2.0
"""The configuration: its fields, how it is read, and the rules it obeys.

An experiment file needs one name of it: `from digseg_jax.config import default`.
"""

from digseg_jax.config.parse import default

__all__ = ["default"]
