# SPDX-License-Identifier: AGPL-3.0-or-later

"""Reports: tables in the terminal, CSV and JSON, plots, and one self-contained page."""

from .extraction_report import write_extraction_report
from .sweep_report import write_sweep_report

__all__ = ["write_extraction_report", "write_sweep_report"]
