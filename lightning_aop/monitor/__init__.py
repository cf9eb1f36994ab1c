"""The Lightning callback that shows, while a model trains, what it looks at, and its parts."""

from lightning_aop.monitor.callback import ExplanationMonitor

__all__ = ["ExplanationMonitor"]
