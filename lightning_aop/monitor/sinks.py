"""Where an explanation goes: each sink reads it, writes what it is for, and computes nothing.

A sink that fails costs the others nothing, and its warning says what it could not do.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from lightning_aop.history.rows import COLUMNS, auc_lines, evolution_rows
from lightning_aop.history.store import History
from lightning_aop.monitor.explanation import Explanation, Moment
from lightning_aop.monitor.loggers import has_tables, log_image, log_lines, log_table
from lightning_aop.monitor.panels import draw_change, draw_probe
from lightning_aop.monitor.run_folder import Earlier


@runtime_checkable
class Sink(Protocol):
    """Takes explanations. Where it fails, a warning gives its `fails`, what is lost in words."""

    def write(self, explanation: Explanation, moment: Moment) -> None:
        """Take one."""
        ...


@dataclass(frozen=True)
class Scalars:
    """The metrics, for loggers, checkpoints and other callbacks.

    Attributes:
        log: takes the values by their logged names.
        prefix: of those names, such as "explain/".
        more: values that are no explanation's own, such as the lines of the controls.
    """

    log: Callable[[dict[str, float], Moment], None]
    prefix: str
    more: dict[str, float]
    fails: ClassVar[str] = "the metrics could not be logged"

    def write(self, explanation: Explanation, moment: Moment) -> None:
        """Log the metrics."""
        values = explanation.values | self.more
        self.log({f"{self.prefix}{name}": value for name, value in values.items()}, moment)


@dataclass(frozen=True)
class Pictures:
    """The heatmap grids, for every logger.

    Attributes:
        loggers: who gets them; PNG files in `fallback` without any.
        fallback: a folder for pictures that no logger takes.
        before: the first and the previous maps.
        prefix: of the tags, such as "explain/".
        warn: is called with a sentence for the user.
        wrote: is called with each file, where a logger doesn't hold the picture itself.
        tag: of the grids.
        headings: a text for each image of the probe.
    """

    loggers: Sequence[object]
    fallback: str | Path
    before: Sequence[Earlier]
    prefix: str
    warn: Callable[[str, str], None]
    wrote: Callable[[Path], None]
    tag: str = "heatmaps"
    headings: Sequence[str] | None = None
    fails: ClassVar[str] = "the heatmaps could not be drawn"

    def write(self, explanation: Explanation, moment: Moment) -> None:
        """Draw the explanation, and what has changed, and log both."""
        pages = draw_probe(explanation, title=moment.title, headings=self.headings)
        for number, page in enumerate(pages, start=1):
            self._log(self.tag if number == 1 else f"{self.tag}-{number}", page, moment)
        change = draw_change(explanation, self.before, title=moment.title)
        if change is not None:
            self._log("heatmaps_change", change, moment)  # sorted after "heatmaps"

    def _log(self, tag: str, picture: Tensor, moment: Moment) -> None:
        tag, step = self.prefix + tag, moment.step
        for logger in [*self.loggers] or [None]:
            fallback = None if logger else self.fallback
            try:
                path = log_image(logger, tag, picture, step, fallback, caption=moment.title)
                if path is not None:
                    self.wrote(path)
            except Exception as error:
                self._rescue(logger, error, tag, picture, step)

    def _rescue(
        self, logger: object, error: Exception, tag: str, picture: Tensor, step: int
    ) -> None:
        """Keep a picture that a logger did not take in a file."""
        what = f"{type(logger).__name__} took no picture" if logger else "no picture was written"
        problem = f"{what}. {type(error).__name__}: {error}."
        try:
            path = log_image(None, tag, picture, step, self.fallback)
        except Exception as again:
            self.warn(problem, f" Nor could it be written to {self.fallback} ({again})")
        else:
            self.warn(problem, f" The picture is at {path}")


def write_tables(folder: Path, loggers: Sequence[object], prefix: str, step: int) -> None:
    """Log the run's explanations as a table, and a chart with the controls, where loggers take them."""
    for logger in filter(has_tables, loggers):
        history = History.load(folder)
        log_table(logger, f"{prefix}evolution", COLUMNS, evolution_rows(history), step)
        title = "overall AUC, and of maps that know nothing of the model"
        log_lines(logger, f"{prefix}overall_auc_and_controls", title, auc_lines(history), step)


_UUID = r"\b[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}\b"


class Warnings:
    """Says each trouble once, for the same comes back at every epoch, and counts it.

    Args:
        emit: says it.
        name: who says it.
    """

    def __init__(self, emit: Callable[[str], None], name: str = "ExplanationMonitor") -> None:
        self._emit, self.name = emit, name
        self._counts: dict[str, int] = {}
        self._words: dict[str, str] = {}

    def __call__(self, message: str, more: str = "") -> None:
        """Warn of `message`, unless it was said before with other numbers; `more` is not compared."""
        # Also hexadecimal ones: addresses, the names of temporary files and of requests.
        key = re.sub(rf"{_UUID}|\b(0x)?[\da-f]*\d[\da-f]*", "", message)
        self._counts[key] = self._counts.get(key, 0) + 1
        if self._counts[key] == 1:
            self._words[key] = message
            self._emit(f"{self.name}: {message}{more}")

    @property
    def told(self) -> list[str]:
        """Each trouble, with how often it came."""
        return [
            text if self._counts[key] == 1 else f"{self._counts[key]} times: {text}"
            for key, text in self._words.items()
        ]
