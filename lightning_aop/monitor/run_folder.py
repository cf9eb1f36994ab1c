"""The files written by a run: its maps and metrics, the page, the animation."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lightning_aop.history.animation import write_animation
from lightning_aop.history.report import add_to_report, write_report
from lightning_aop.history.store import HistoryWriter, Record, stored
from lightning_aop.metrics.similarity import rank_correlation
from lightning_aop.monitor.lightning import Trainer
from lightning_aop.types import Maps

Pair: TypeAlias = tuple[int, int]
Earlier: TypeAlias = tuple[str, dict[Pair, UInt8[Tensor, "i j"]]]


class RunFiles:
    """The folder `explanations` of a run, which no other run has, and which a resumed one takes along.

    Args:
        warn: what is called with a sentence for the user.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._folder: Path | None = None
        self._writer: HistoryWriter | None = None
        self._earlier: tuple[Path, int] | None = None  # the folder and the records of a checkpoint
        self._paged = False  # the page is there, and holds all records

    @property
    def folder(self) -> Path | None:
        """Where all is, once there is a record."""
        written = self._writer is not None and self._writer.records > 0
        return self._folder if written else None

    def state(self) -> dict[str, Any]:
        """Return what `take_up` needs in a checkpoint."""
        if self._writer is None:
            return {}
        return {"folder": str(self._writer.folder), "records": self._writer.records}

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Go on with the history of the run that is resumed."""
        if "folder" in state:
            self._earlier = Path(state["folder"]), state["records"]

    def open(self, trainer: Trainer, begun: Callable[[Path], HistoryWriter]) -> None:
        """Make the folder, unless it is there or the trainer wants no files.

        Args:
            trainer: whose logger says where.
            begun: what begins a history in a folder.

        Raises:
            OSError: the folder can't be made.
        """
        if trainer.state.fn != "fit" or _leaves_no_files(trainer) or self._writer is not None:
            return
        if self._folder is None:
            self._folder = self._free_folder(trainer)
        writer = begun(self._folder)
        if self._earlier is not None:
            try:
                writer.keep(*self._earlier)
            except (OSError, ValueError) as error:
                self._warn(
                    "ExplanationMonitor: the history of the run that is resumed could not be "
                    f"found, a new one begins. {type(error).__name__}: {error}"
                )
        self._writer = writer

    def _free_folder(self, trainer: Trainer) -> Path:
        """Return a folder that no other run has, or that of the run which is resumed."""
        folder, number = _history_folder(trainer), 1
        if self._earlier is not None and self._earlier[0].parent == folder.parent:
            return self._earlier[0]
        while folder.exists():
            number += 1
            folder = folder.with_name(f"explanations-{number}")
        return folder

    def drift(
        self, pairs: list[Pair], maps: Maps, shows: list[bool]
    ) -> tuple[list[float | None], list[Earlier]]:
        """Compare maps with those that were found before.

        Args:
            pairs: the picture and the class of each map.
            maps: what was found now.
            shows: which of them show anything.

        Returns:
            1 − the rank correlation of each map with the one before, None without one; and of the
            first record and of the last the title with the maps, as stored.
        """
        drift: list[float | None] = [None] * len(pairs)
        if self._writer is None:
            return drift, []
        before = [
            (title, {pair: torch.from_numpy(array) for pair, array in found.items()})
            for title, found in self._writer.earlier_maps()
        ]
        last = before[-1][1] if before else {}
        now = [
            n
            for n, pair in enumerate(pairs)
            if shows[n] and pair in last and last[pair].amax() > last[pair].amin()
        ]
        if now:
            both = stored(maps[now]).cpu(), torch.stack([last[pairs[n]] for n in now])
            alike = rank_correlation(*(each.double() for each in both))
            for n, value in zip(now, alike.tolist(), strict=True):
                drift[n] = 1 - value
        return drift, before

    def add(self, record: Record, maps: Float[Tensor, "p h w"]) -> None:
        """Add a record to the history and to the page.

        Raises:
            OSError, ValueError: they can't be written.
        """
        if self._writer is None:
            return
        small = stored(maps)
        paged, self._paged = self._paged, False  # where it fails, the page is written anew
        self._writer.add(record, small)
        if paged:
            add_to_report(self._writer.folder, record, small.cpu().numpy())
        else:
            write_report(self._writer.folder)
        self._paged = True

    def finish(self) -> None:
        """Write the animation of the maps.

        Raises:
            OSError, ValueError: it can't be written.
        """
        if self.folder is not None:
            write_animation(self.folder)


def _leaves_no_files(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False) or getattr(trainer, "barebones", False))


def _history_folder(trainer: Trainer) -> Path:
    """Return where a logger has its files, as Lightning's ModelCheckpoint finds it."""
    directory: str | Path | None = None
    for logger in trainer.loggers:
        directory = getattr(logger, "log_dir", None)
        if directory is None and logger.save_dir is not None:
            directory = Path(logger.save_dir) / str(logger.name) / str(logger.version)
        if directory is not None:
            break
    return Path(directory or trainer.default_root_dir) / "explanations"
