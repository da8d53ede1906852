# SPDX-License-Identifier: AGPL-3.0-or-later

"""The paper's measurements (sections 3.3 to 5): the sweep, divergence, capture and geometry."""
