# SPDX-License-Identifier: Apache-2.0
"""DiGSeg in JAX: a Stable Diffusion U-Net fine-tuned to denoise segmentation masks."""

__version__ = "0.1.0"
