# SPDX-License-Identifier: AGPL-3.0-or-later

"""Tiers of responses (paper, section 3.3), judged from their form, and their coherence. Imports no PyTorch."""

from .responses import Tier, classify_response

__all__ = ["Tier", "classify_response"]
