"""The folder of a run: the maps and metrics of its explanations, the page and the animation."""

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lightning_aop.files import write_whole
from lightning_aop.history.animation import write_animation
from lightning_aop.history.failures import NAME as FAILURES
from lightning_aop.history.failures import FailureRecord, line_of, lines_of
from lightning_aop.history.report import (
    add_failures_to_report,
    add_to_report,
    end_report,
    write_report,
)
from lightning_aop.history.store import HistoryWriter, Readable, Record, readable, stored
from lightning_aop.metrics.pointing import energy_in_mask, pointing_hits
from lightning_aop.metrics.similarity import rank_correlation
from lightning_aop.monitor.explanation import Explanation, Moment, Pair

Earlier: TypeAlias = tuple[str, dict[Pair, UInt8[Tensor, "i j"]]]
"""The title of an earlier explanation and its maps, as stored."""


class RunFolder:
    """The folder `explanations` of a run, which no other run has, and which a resumed one takes along.

    Args:
        warn: is called with a sentence for the user.
    """

    fails: ClassVar[str] = "the maps could not be stored"

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._writer: HistoryWriter | None = None
        self._earlier: tuple[Path, int] | None = None  # the folder and the records of a checkpoint
        self._paged = False  # the page is there, and holds all records
        self._failures: tuple[Path | None, int] = (None, 0)  # their file, and its records
        self._pictured: set[str] | None = None  # whose images are in it; None before it was read

    @property
    def folder(self) -> Path | None:
        """Where all is, once there is a record."""
        written = self._writer is not None and self._writer.records > 0
        return self._writer.folder if self._writer is not None and written else None

    def state(self) -> dict[str, Any]:
        """Return what `take_up` needs in a checkpoint."""
        if self._writer is None:
            return {}
        return {
            "folder": str(self._writer.folder),
            "records": self._writer.records,
            "failures": self._failures[1],
        }

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Go on with the history of the run that is resumed."""
        if "folder" in state:
            self._earlier = Path(state["folder"]), int(state["records"])
            self._failures = self._earlier[0] / FAILURES, int(state.get("failures", 0))
            self._pictured = None

    def open(self, wanted: Path, images: int, begun: Callable[[Path], HistoryWriter]) -> None:
        """Make the folder, unless it is there; beside one that is damaged, go on with what is whole.

        Args:
            wanted: where; another with a number if a run has it already.
            images: how many images there are to explain.
            begun: begins a history in a folder.

        Raises:
            OSError: the folder can't be made.
        """
        problems: list[str] = []
        if self._writer is not None:
            if self._writer.is_whole():
                return
            problems.append("someone else has changed it")
            self._earlier = self._writer.folder, self._writer.records
            self._writer, self._paged = None, False
        if self._earlier is None:
            self._writer = self._beside(wanted, begun, None)
            return
        source, count = self._earlier
        earlier = readable(source, images, count)
        problems += earlier.lost
        if earlier.unknown:
            problems.append(f"a later version has written {', '.join(sorted(earlier.unknown))}")
        if source.parent == wanted.parent and not problems:
            try:
                self._writer = begun(source)
                self._writer.keep(earlier)
                return
            except OSError as error:
                problems.append(f"{type(error).__name__}: {error}")
        self._writer = self._beside(wanted, begun, earlier)
        if problems:
            self._warn(
                f"the history in {source} can't be gone on with ({'; '.join(problems)}): "
                f"{len(earlier.records)} of its {count} records go on in {self._writer.folder}"
            )

    def _beside(
        self, wanted: Path, begun: Callable[[Path], HistoryWriter], earlier: Readable | None
    ) -> HistoryWriter:
        """Begin with earlier records in a folder that no other run has."""
        folder = _made(wanted)
        try:
            writer = begun(folder)
            if earlier is not None:
                writer.keep(earlier)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # each attempt would leave another
            raise
        return writer

    def compare(self, explanation: Explanation) -> tuple[list[float | None], list[Earlier]]:
        """Compare maps with those of the explanation before.

        Returns:
            1 − the rank correlation of each map with the one before, None without one; and the first
            record and the last, one entry where they are the same.
        """
        drift: list[float | None] = [None] * len(explanation.rows)
        if self._writer is None:
            return drift, []
        before = [
            (title, {pair: torch.from_numpy(array) for pair, array in found.items()})
            for title, found in self._writer.earlier_maps()
        ]
        last = before[-1][1] if before else {}
        pairs = explanation.pairs
        now = [
            n
            for n, (pair, blank) in enumerate(zip(pairs, explanation.blank.tolist(), strict=True))
            if not blank and pair in last and last[pair].amax() > last[pair].amin()
        ]
        if now:
            earlier = torch.stack([last[pairs[n]] for n in now])
            alike = rank_correlation(stored(explanation.maps[now]).double(), earlier.double())
            for n, value in zip(now, alike.tolist(), strict=True):
                drift[n] = 1 - value
        return drift, before

    def write(self, explanation: Explanation, moment: Moment) -> None:
        """Add a record to the history and to the page.

        Raises:
            OSError, ValueError: they can't be written.
        """
        if self._writer is None:
            return
        deletion, insertion = _columns(explanation.aucs)
        curves = [_curves(explanation.curves[:, game]) for game in range(2)]
        places = _places(explanation)
        record = Record(
            step=moment.step,
            epoch=moment.epoch,
            title=moment.title,
            values=explanation.values,
            images=explanation.rows.tolist(),
            targets=explanation.targets.tolist(),
            scores=explanation.scores.nan_to_num(0.0).tolist(),
            blank=explanation.blank.tolist(),
            drift=list(explanation.drift),
            deletion_auc=deletion,
            insertion_auc=insertion,
            controls=explanation.controls,
            predicted=explanation.predicted.tolist(),
            verdicts=list(explanation.verdicts),
            predicted_scores=explanation.predicted_scores.nan_to_num(0.0).tolist(),
            deletion=curves[0],
            insertion=curves[1],
            energy=places["energy"],
            hits=places["hits"],
            peaks=places["peaks"],
            away=places["away"],
            control_aucs=dict(
                zip(explanation.controls, _columns(explanation.control_aucs), strict=True)
            ),
            time=round(time.time(), 1),
        )
        small = stored(explanation.maps)
        paged, self._paged = self._paged, False  # where it fails, the page is written anew
        self._writer.add(record, small)
        try:
            if paged:
                add_to_report(self._writer.folder, record, small.numpy())
            else:
                write_report(self._writer.folder)
        except Exception as error:
            self._warn(f"the page could not be written. {type(error).__name__}: {error}")
        else:
            self._paged = True

    def write_failures(self, record: FailureRecord) -> None:
        """Add a record of the failures; an image is stored once.

        Raises:
            OSError: it can't be written.
        """
        if self._writer is None:
            return
        path, (earlier, count) = self._writer.folder / FAILURES, self._failures
        lines = lines_of(earlier)[:count] if earlier is not None else []
        if self._pictured is None:
            self._pictured = {name for line in lines for name in json.loads(line)["images"]}
        pictured = self._pictured
        new = {name: url for name, url in record.images.items() if name not in pictured}
        record = replace(record, images=new)
        line = line_of(record)
        if earlier == path and len(lines_of(path)) == count:
            with path.open("ab") as file:
                file.write(line)
        else:  # of another run, or of what came after the checkpoint
            write_whole(path, b"".join([*lines, line]))
        self._failures = path, len(lines) + 1
        self._pictured |= new.keys()
        if self._paged:
            self._paged = False  # where it fails, the page is written anew
            add_failures_to_report(self._writer.folder, record)
            self._paged = True

    def finish(self) -> None:
        """Make an animation of the maps, and let the page say that the run has ended.

        Raises:
            OSError, ValueError: they can't be written.
        """
        if self._writer is not None and self.folder is not None:
            if self._writer.is_whole():  # and not another run's by now
                self._writer.finish()
                if self._paged:
                    end_report(self.folder)
            write_animation(self.folder)


def _columns(values: Float[Tensor, "p columns"]) -> list[list[float | None]]:
    """Return each column, None for NaN."""
    return [[None if math.isnan(v) else v for v in column] for column in values.T.tolist()]


def _curves(curves: Float[Tensor, "p points"]) -> list[list[float] | None]:
    """Return curves as they are stored: four decimals are finer than a page can draw."""
    known = curves.isfinite().all(dim=1).tolist()
    rounded = [[round(value, 4) for value in curve] for curve in curves.tolist()]
    return [curve if finite else None for curve, finite in zip(rounded, known, strict=True)]


def _places(explanation: Explanation) -> dict[str, list[Any]]:
    """Return where each map is hottest, and how that and its heat lie to the object."""
    found: dict[str, list[Any]] = {
        name: [None] * len(explanation.rows) for name in ("peaks", "energy", "hits", "away")
    }
    masks, known = explanation.probe.masks_of(explanation.rows, explanation.targets)
    known &= masks.flatten(1).any(dim=1)
    height, width = explanation.maps.shape[1:]
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    for n in (~explanation.blank).nonzero()[:, 0].tolist():
        heat, mask = explanation.maps[n : n + 1].double(), masks[n : n + 1]
        y, x = divmod(int(heat.argmax()), width)
        found["peaks"][n] = [round((y + 0.5) / height, 4), round((x + 0.5) / width, 4)]
        if known[n]:
            distance = ((rows - y) ** 2 + (columns - x) ** 2)[mask[0]].amin().sqrt()
            found["energy"][n] = float(energy_in_mask(heat, mask))
            found["hits"][n] = float(pointing_hits(heat, mask))
            found["away"][n] = float(distance) / max(height, width)
    return found


def _made(wanted: Path) -> Path:
    """Make a folder that no other run has, with a number where the name is taken."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    folder, number = wanted, 1
    while True:
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
            folder = wanted.with_name(f"{wanted.name}-{number}")
        else:
            return folder
