"""Stand-in of the stored explanations of a run."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Record:
    """One time at which the probe was explained."""

    step: int
    epoch: int
    title: str
    values: dict[str, float]
    images: list[int]
    targets: list[int]
    scores: list[float]
    blank: list[bool]
    drift: list[float | None]
    first: int


@dataclass(frozen=True)
class History:
    """What a run stored."""

    configuration: dict[str, str]
    class_names: dict[int, str]
    references: dict[str, dict[str, float]]
    images: np.ndarray
    maps: np.ndarray
    records: list[Record]

    @classmethod
    def load(cls, folder: str | Path) -> "History":
        """Read it."""
        raise NotImplementedError
