# SPDX-License-Identifier: Apache-2.0
"""The configuration: its fields, the rules they obey, and what the Stable Diffusion recipes share."""
