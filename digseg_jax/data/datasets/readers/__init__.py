# SPDX-License-Identifier: Apache-2.0
"""One module per family of downloads: `open_NAME(spec, root, split)` -> a random-access source."""
