# SPDX-License-Identifier: Apache-2.0
"""A page on this machine that segments images while one watches."""
