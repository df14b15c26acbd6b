# SPDX-License-Identifier: Apache-2.0
"""From images and queries to masks: the one engine that prediction, evaluation and suites share."""
