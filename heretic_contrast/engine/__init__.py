# SPDX-License-Identifier: AGPL-3.0-or-later

"""Runs a model under many interventions at once."""
