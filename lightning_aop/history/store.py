"""The probe's maps and scores over the epochs, in one folder a run that outlives the process.

The folder has these files, which anything can read:

- `maps.npy`: all maps, uint8 [M, h, w], 255 for 1: `np.load("maps.npy") / 255`;
- `history.jsonl`: a line for each time at which the probe was explained, a `Record`;
- `images.npy`: the pictures, uint8 [N, H, W, 3];
- `masks.npy`: where the data says the objects are, bool [K, H, W];
- `run.json`: the configuration, the names of the classes, and of which picture and class each mask is.

A record is written after its maps, so that a process may end at any moment: what is half there does
not count, and is overwritten when the run is resumed.
"""

import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_aop.files import write_whole

__all__ = ["History", "Record"]

_SIDE = 112  # of a stored map, at most: of 800 maps 10 MB, and finer than any network's layer


@dataclass(frozen=True)
class Record:
    """What was found at one time.

    Attributes:
        step: optimizer steps until then.
        epoch: which one, from 0.
        title: when, in words.
        values: the figures, by name, without `explain/`.
        images: which picture each explanation is of.
        targets: which class.
        scores: F_c of each.
        blank: which maps show nothing.
        drift: 1 − the rank correlation with the map before, of the same picture and class.
        deletion_auc: of each explanation, None where it was not judged.
        insertion_auc: likewise.
        controls: the figures, by name, that maps which know nothing of the model had at that time, by
            their own name; empty where they were not measured.
        predicted: the likeliest class of each explanation's image.
        verdicts: what the model said of each against its label: right, wrong, missed, false positive or
            absent; None without labels.
        first: its maps are `maps[first : first + len(images)]`.
    """

    step: int
    epoch: int
    title: str
    values: dict[str, float]
    images: list[int]
    targets: list[int]
    scores: list[float]
    blank: list[bool]
    drift: list[float | None]
    deletion_auc: list[float | None]
    insertion_auc: list[float | None]
    controls: dict[str, dict[str, float]] = field(default_factory=dict)
    predicted: list[int] = field(default_factory=list)
    verdicts: list[str | None] = field(default_factory=list)
    first: int = 0

    @property
    def end(self) -> int:
        """The place after its last map."""
        return self.first + len(self.images)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The picture and the class of each explanation."""
        return list(zip(self.images, self.targets, strict=True))


@dataclass(frozen=True)
class History:
    """All that a run has stored.

    Attributes:
        configuration: settings by name.
        class_names: names by class index.
        images: the pictures as they are shown.
        masks: where an object is, by picture and class; not for all.
        maps: those of all records, 255 for 1.
        records: in their order.
    """

    configuration: dict[str, str]
    class_names: dict[int, str]
    images: UInt8[np.ndarray, "n y x 3"]
    masks: dict[tuple[int, int], Bool[np.ndarray, "y x"]]
    maps: UInt8[np.ndarray, "m h w"]
    records: list[Record] = field(default_factory=list)

    def class_name(self, target: int) -> str:
        """Return the name of a class, or its index in words."""
        return self.class_names.get(target, f"class {target}")

    @classmethod
    def load(cls, folder: str | Path) -> "History":
        """Read a folder; maps stay on the disk until they are looked at.

        Raises:
            FileNotFoundError: nothing has been stored there.
            ValueError: a file is damaged.
        """
        folder = Path(folder)
        if not (folder / "run.json").exists():
            raise FileNotFoundError(
                f"{folder} has no run.json: name the folder `explanations` that a run with an "
                "ExplanationMonitor has written"
            )
        try:
            about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            images = np.load(folder / "images.npy", allow_pickle=False)
            maps, records = np.zeros((0, 1, 1), dtype=np.uint8), []
            if (folder / "maps.npy").exists():
                maps = np.load(folder / "maps.npy", mmap_mode="r", allow_pickle=False)
                records = _records(folder / "history.jsonl", len(maps))
            masks = np.load(folder / "masks.npy", allow_pickle=False)
            objects = dict(zip(map(tuple, about["masks"]), masks, strict=True))
            names = {int(index): name for index, name in about["class_names"].items()}
            return cls(about["configuration"], names, images, objects, maps, records)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(f"{folder} can't be read. {type(error).__name__}: {error}") from error


def _records(path: Path, maps: int) -> list[Record]:
    """Return the records up to the first that is not wholly there."""
    records: list[Record] = []
    if not path.exists():
        return records
    for line in path.read_bytes().splitlines(keepends=True):
        # A process that was killed leaves a last line without its end.
        if not line.endswith(b"\n"):
            break
        record = Record(**json.loads(line))
        record.values.update({n: math.nan for n, v in record.values.items() if v is None})
        if record.end > maps:
            break
        records.append(record)
    return records


class HistoryWriter:
    """Adds to a folder, record after record."""

    def __init__(
        self,
        folder: Path,
        images: UInt8[Tensor, "n 3 y x"],
        *,
        configuration: Mapping[str, str],
        class_names: Mapping[int, str],
        masks: Mapping[tuple[int, int], Bool[Tensor, "y x"]] | None = None,
    ) -> None:
        masks = masks or {}
        self.folder = folder
        self.records = 0
        self._first: Record | None = None
        self._last: Record | None = None
        self._bytes = 0
        about = {
            "configuration": dict(configuration),
            "class_names": dict(class_names),
            "masks": list(masks),
        }
        folder.mkdir(parents=True, exist_ok=True)
        _save(folder / "images.npy", images.permute(0, 2, 3, 1).contiguous().cpu().numpy())
        shape = (0, *images.shape[2:])
        found = torch.stack(list(masks.values())).cpu() if masks else torch.zeros(shape).bool()
        _save(folder / "masks.npy", found.numpy())
        write_whole(folder / "run.json", json.dumps(about, indent=1).encode())

    def keep(self, source: Path, count: int) -> None:
        """Begin with the first records of another folder, or of this one, and forget the rest.

        Raises:
            FileNotFoundError, ValueError: there are not as many.
        """
        earlier = History.load(source)
        if len(earlier.records) < count:
            raise ValueError(f"{source} has {len(earlier.records)} records, not {count}")
        records = earlier.records[:count]
        self._first, self._last = (records[0], records[-1]) if records else (None, None)
        _save(self.folder / "maps.npy", np.array(earlier.maps[: self._next]))
        lines = "".join(map(_line, records)).encode()
        write_whole(self.folder / "history.jsonl", lines)
        self.records, self._bytes = count, len(lines)

    def add(self, record: Record, maps: UInt8[Tensor, "p h w"]) -> None:
        """Add a record and its maps, as `stored` gives them; `record.first` is set here."""
        if self.records == 0:
            _save(self.folder / "maps.npy", np.zeros((0, *maps.shape[1:]), dtype=np.uint8))
            write_whole(self.folder / "history.jsonl", b"")
        _extend(self.folder / "maps.npy", self._next, maps.contiguous().cpu().numpy())
        record = replace(record, first=self._next)
        line = _line(record).encode()
        with (self.folder / "history.jsonl").open("r+b") as file:
            file.seek(self._bytes)
            file.write(line)
            file.truncate()
        self.records += 1
        self._first = self._first or record
        self._last, self._bytes = record, self._bytes + len(line)

    @property
    def _next(self) -> int:
        return 0 if self._last is None else self._last.end

    def earlier_maps(self) -> list[tuple[str, dict[tuple[int, int], UInt8[np.ndarray, "h w"]]]]:
        """Return the title of the first record and of the last, each with its maps by picture and class.

        There is one entry where both are the same record, and none where there is no record.
        """
        if self._first is None or self._last is None:
            return []
        records = [self._first, self._last][self._first is self._last :]
        # Read again each time, so that nothing is held in between.
        maps = np.load(self.folder / "maps.npy", mmap_mode="r", allow_pickle=False)
        return [
            (
                record.title,
                {
                    pair: np.array(maps[record.first + place])
                    for place, pair in enumerate(record.pairs)
                },
            )
            for record in records
        ]


def _line(record: Record) -> str:
    # JSON has no NaN; a record's figures that are not finite are None in the file.
    known = {"values": _finite(record.values)}
    known["controls"] = {name: _finite(figures) for name, figures in record.controls.items()}
    return json.dumps(asdict(record) | known, allow_nan=False) + "\n"


def _finite(figures: Mapping[str, float]) -> dict[str, Any]:
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def stored(maps: Float[Tensor, "p h w"]) -> UInt8[Tensor, "p i j"]:
    """Return maps in [0, 1] as they are stored: 255 for 1, no larger than is of use, NaN as 0."""
    factor = _SIDE / max(maps.shape[1:])
    maps = maps.float().nan_to_num(0.0)
    if factor < 1:
        size = [max(1, round(side * factor)) for side in maps.shape[1:]]
        maps = interpolate(maps[:, None], size, mode="area")[:, 0]
    return (maps.clamp(0, 1) * 255).round().to(torch.uint8)


def _save(path: Path, array: np.ndarray) -> None:
    content = io.BytesIO()
    np.lib.format.write_array(content, array, version=(1, 0), allow_pickle=False)
    write_whole(path, content.getvalue())


def _extend(path: Path, first: int, maps: UInt8[np.ndarray, "p h w"]) -> None:
    """Write maps at a place of an array in a file, which then ends with them.

    NumPy leaves room in the header for the first number of the shape to grow. It is written last:
    until then a reader sees the array as it was.
    """
    with path.open("r+b") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if shape[1:] != maps.shape[1:] or dtype != maps.dtype:
            raise ValueError(f"{path} has maps of {shape[1:]}, not of {maps.shape[1:]}")
        start = file.tell()
        file.seek(start + first * math.prod(shape[1:]))
        file.write(maps.tobytes())
        file.truncate()
        file.flush()
        file.seek(0)
        now = {"shape": (first + len(maps), *shape[1:]), "fortran_order": False, "descr": "|u1"}
        np.lib.format.write_array_header_1_0(file, now)
        if file.tell() != start:
            raise RuntimeError(f"{path}: the header does not fit any more")
