# SPDX-License-Identifier: AGPL-3.0-or-later

"""The replication of arXiv:2603.22061: measurements with controls and intervals, and the report made from them."""
