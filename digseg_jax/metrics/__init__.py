# SPDX-License-Identifier: Apache-2.0
"""Integer counts of predicted against true masks, and the scores made of them."""
