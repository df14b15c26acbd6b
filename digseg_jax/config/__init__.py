# SPDX-License-Identifier: Apache-2.0
"""The configuration: its fields, how it is parsed, and the rules between its values.

An experiment file needs only one import: `from digseg_jax.config import default`.
"""

from digseg_jax.config.parse import default

__all__ = ["default"]
