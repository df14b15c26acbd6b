# SPDX-License-Identifier: Apache-2.0
"""What is trained: each task brings its parameters, its frozen towers, its loss and its export."""
