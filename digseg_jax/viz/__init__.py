# SPDX-License-Identifier: Apache-2.0
"""Images for people: colors of classes, overlays, and the files of a gallery."""
