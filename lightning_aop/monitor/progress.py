"""A progress bar for explanations that take long."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import nn
from tqdm import tqdm

from lightning_aop.model.passes import Evaluations, count_evaluations
from lightning_aop.monitor.lightning import Trainer

_DELAY = 5.0  # seconds: what is over sooner needs no bar
_INTERVAL = 0.5  # seconds

Show: TypeAlias = Callable[[Evaluations], None]


@contextmanager
def progress_bar(trainer: Trainer, model: nn.Module, pictures: int) -> Iterator[None]:
    """Count the evaluations of `model` in a bar, where the trainer shows bars of its own."""
    bar = trainer.progress_bar_callback
    if bar is None or not getattr(bar, "is_enabled", True) or not trainer.is_global_zero:
        yield
        return
    text = f"explaining {pictures} picture{'s' * (pictures != 1)}"
    rich = getattr(bar, "progress", None)
    # Rich draws all its bars again and again, and another's among them would be lost.
    drawing = getattr(getattr(rich, "live", None), "is_started", False)
    with _rich(rich, text) if drawing else _tqdm(text) as show, count_evaluations(model, show):
        yield


@contextmanager
def _tqdm(text: str) -> Iterator[Show]:
    with tqdm(
        desc=text,
        unit=" evaluations",
        delay=_DELAY,
        mininterval=_INTERVAL,
        miniters=1,
        leave=False,
        dynamic_ncols=True,
    ) as bar:

        def show(count: Evaluations) -> None:
            bar.update(count.total - bar.n)

        yield show


@contextmanager
def _rich(bars: Any, text: str) -> Iterator[Show]:
    """Add a bar to those of Lightning's RichProgressBar."""
    task, due = None, time.perf_counter() + _DELAY

    def show(count: Evaluations) -> None:
        nonlocal task, due
        now = time.perf_counter()
        if now < due:
            return
        due = now + _INTERVAL
        if task is None:
            task = bars.add_task(f"{text}, evaluations", total=math.inf)
        bars.update(task, completed=count.total, refresh=True)

    try:
        yield show
    finally:
        if task is not None:
            bars.remove_task(task)
