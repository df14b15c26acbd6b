# SPDX-License-Identifier: Apache-2.0
"""Between masks and latents: codecs, prompts, sampling, views of large images, calibration."""
