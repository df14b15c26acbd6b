# SPDX-License-Identifier: Apache-2.0
"""The networks of Stable Diffusion: U-Net, autoencoders, text encoders."""
