# SPDX-License-Identifier: AGPL-3.0-or-later

"""The fast engine: what is known is not computed again."""
