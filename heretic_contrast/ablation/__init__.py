# SPDX-License-Identifier: AGPL-3.0-or-later

"""What an ablation does to a layer's contribution, as hooks and as changed weights (paper, section 2.1)."""
