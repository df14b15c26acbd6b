# SPDX-License-Identifier: Apache-2.0
"""From files to batches: data sets, crops, queries, and one deterministic stream."""
