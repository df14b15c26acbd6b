# SPDX-License-Identifier: Apache-2.0
"""Files of a run: storage on disks and in buckets, the workdir, metrics, progress and checkpoints."""
