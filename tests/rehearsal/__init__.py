# SPDX-License-Identifier: Apache-2.0
"""Every configuration goes the whole way in miniature, as a user types it.

`trees` makes the data, `stage` runs the commands, `story` is the way; the tests choose who goes it.
"""
