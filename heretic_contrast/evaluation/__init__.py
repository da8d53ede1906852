# SPDX-License-Identifier: AGPL-3.0-or-later

"""The paper's measurements (section 3.4): the sweep, divergence, capture and geometry."""
