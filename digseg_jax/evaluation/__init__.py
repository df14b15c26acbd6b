# SPDX-License-Identifier: Apache-2.0
"""Examples in, masks from the segmenter, integer counts out: every score of the project."""
