# SPDX-License-Identifier: AGPL-3.0-or-later

"""Faster ways through layers on a CPU."""
