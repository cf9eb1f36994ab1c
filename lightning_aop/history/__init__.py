"""The files written by a run: its maps and scores, the page and the animation made of them."""

from lightning_aop.history.animation import write_animation
from lightning_aop.history.failures import FailureRecord, picture_of
from lightning_aop.history.report import write_report
from lightning_aop.history.store import History, Record

__all__ = ["FailureRecord", "History", "Record", "picture_of", "write_animation", "write_report"]
