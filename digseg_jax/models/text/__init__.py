# SPDX-License-Identifier: Apache-2.0
"""Text encoders and their tokenizer, and CLIP's image encoder."""
