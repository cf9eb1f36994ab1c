"""The files written by a run, and what is made of them: the page, animation, figure and tables."""

from lightning_aop.history.animation import write_animation
from lightning_aop.history.export import write_numbers
from lightning_aop.history.failures import FailureRecord, picture_of
from lightning_aop.history.figure import write_figure
from lightning_aop.history.report import write_comparison, write_report
from lightning_aop.history.store import History, Record

__all__ = [
    "FailureRecord",
    "History",
    "Record",
    "picture_of",
    "write_animation",
    "write_comparison",
    "write_figure",
    "write_numbers",
    "write_report",
]
