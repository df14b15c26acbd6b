# SPDX-License-Identifier: Apache-2.0
"""The networks, as Stable Diffusion has them: U-Net, autoencoders, text encoders."""
