# SPDX-License-Identifier: AGPL-3.0-or-later

"""Contrast baselines and multi-directional refusal ablation for Heretic (arXiv:2603.22061)."""

__version__ = "0.1.0"
