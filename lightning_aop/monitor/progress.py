"""A progress bar for explanations that take long, and how long they will take."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

from torch import nn
from tqdm import tqdm

from lightning_aop.model.passes import Evaluations, count_evaluations
from lightning_aop.monitor.lightning import Trainer

_DELAY = 5.0  # seconds: what is over sooner needs no bar, and nobody told beforehand
_INTERVAL = 0.5  # seconds
_LONG = 60.0  # seconds: what takes longer may be more than was meant

Begin: TypeAlias = Callable[[int | None, float], None]
"""Takes the model evaluations ahead, None if that isn't known, and the seconds that one takes."""


@contextmanager
def progress_bar(
    trainer: Trainer | None,
    model: nn.Module,
    images: int,
    inform: Callable[[str], None] | None = None,
) -> Iterator[Begin]:
    """Count the evaluations of `model` in a bar; a trainer decides whether, and which.

    Args:
        trainer: whose bars are shown; None for one of our own.
        model: what is evaluated.
        images: how many are explained.
        inform: is told beforehand what will take long.

    Yields:
        What is told how much there is to do.
    """
    text = f"explaining {images} image{'s' * (images != 1)}"

    def tell(evaluations: int | None, seconds: float) -> None:
        if inform is not None and evaluations is not None and evaluations * seconds > _DELAY:
            inform(_estimate(text, evaluations, evaluations * seconds))

    own = trainer is None
    bar = None if trainer is None else trainer.progress_bar_callback
    shown = bar is not None and getattr(bar, "is_enabled", True)
    if not own and not (shown and trainer.is_global_zero):  # type: ignore[union-attr]
        yield tell
        return
    rich = getattr(bar, "progress", None)
    # Rich draws all its bars again and again, and another's among them would be lost.
    drawing = getattr(getattr(rich, "live", None), "is_started", False)
    with (
        _rich(rich, text) if drawing else _tqdm(text) as (show, expect),
        count_evaluations(model, show),
    ):

        def begin(evaluations: int | None, seconds: float) -> None:
            tell(evaluations, seconds)
            if evaluations is not None:
                expect(evaluations)

        yield begin


def _estimate(text: str, evaluations: int, seconds: float) -> str:
    told = f"{text} takes about {_duration(seconds)}, for {evaluations:,} model evaluations"
    if seconds < _LONG:
        return told
    return f"{told}: a smaller probe=…, metrics=False or fast_sigcam(iterations=4) take less"


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


_Shown: TypeAlias = tuple[Callable[[Evaluations], None], Callable[[int], None]]
"""Shows how many evaluations were made, and takes how many more there will be."""


@contextmanager
def _late(show: Callable[[int, float], None], close: Callable[[], None]) -> Iterator[_Shown]:
    """Show a bar when the delay is over: what is over sooner needs none.

    Args:
        show: takes how many evaluations were made, and how many there are in all, if need be inf.
        close: takes the bar away.
    """
    due, total, done = time.perf_counter() + _DELAY, math.inf, 0

    def count(evaluations: Evaluations) -> None:
        nonlocal due, total, done
        now, done = time.perf_counter(), evaluations.total
        if now < due:
            return
        due = now + _INTERVAL
        show(done, max(total, done))  # it may be an estimate

    def expect(more: int) -> None:
        nonlocal total
        total = done + more

    try:
        yield count, expect
    finally:
        close()


def _tqdm(text: str) -> AbstractContextManager[_Shown]:
    bar: tqdm[Any] | None = None

    def show(done: int, total: float) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(
                desc=text,
                unit=" evaluations",
                initial=done,
                mininterval=0,
                miniters=1,
                leave=False,
                dynamic_ncols=True,
            )
        bar.total = None if math.isinf(total) else total
        bar.update(done - bar.n)

    return _late(show, lambda: None if bar is None else bar.close())


def _rich(bars: Any, text: str) -> AbstractContextManager[_Shown]:
    """Return one among the bars of Lightning's RichProgressBar."""
    task = None

    def show(done: int, total: float) -> None:
        nonlocal task
        if task is None:
            task = bars.add_task(f"{text}, evaluations", total=total)
        bars.update(task, completed=done, total=total, refresh=True)

    return _late(show, lambda: None if task is None else bars.remove_task(task))
