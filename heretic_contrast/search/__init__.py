# SPDX-License-Identifier: AGPL-3.0-or-later

"""The search of ablation weights in Heretic's Optuna study."""
