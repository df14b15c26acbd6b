# SPDX-License-Identifier: Apache-2.0
"""What a run writes and reads back: storage on disks and in buckets, logs, the workdir, checkpoints."""
