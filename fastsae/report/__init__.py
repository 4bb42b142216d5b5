"""Reports on trained SAEs: one HTML file each, which loads nothing."""

from .config import ReportConfig
from .origin import Origin
from .report import write_report
from .sweep import write_comparison

__all__ = ["Origin", "ReportConfig", "write_comparison", "write_report"]
