"""Reports on trained SAEs: one HTML file each, which loads nothing."""

from .config import ReportConfig
from .report import write_report
from .subject import Subject
from .sweep import write_comparison

__all__ = ["Subject", "ReportConfig", "write_comparison", "write_report"]
