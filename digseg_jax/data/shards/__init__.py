# SPDX-License-Identifier: Apache-2.0
"""Prepared data: examples, or their latents, as records in shard files on a disk or in a bucket."""
