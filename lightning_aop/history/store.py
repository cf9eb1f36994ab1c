"""The probe's maps and scores over the epochs, in one folder a run that outlives the process.

The folder has these files, which anything can read:

- `maps.npy`: all maps, uint8 [M, h, w], 255 for 1: `np.load("maps.npy") / 255`;
- `history.jsonl`: a line for each time at which the probe was explained, a `Record`;
- `images.npy`: the images, uint8 [N, H, W, 3];
- `masks.npy`: where the data says the objects are, bool [K, H, W];
- `run.json`: the configuration, the names of the classes, the image and class of each mask, how many
  epochs are wanted, and whether the run has ended;
- `failures.jsonl`: the worst samples of the validations, with their images and maps, see `failures.py`.

A record is written after its maps, so that a process may end at any moment: what is half there does
not count, and is overwritten when the run is resumed. Of damaged files, and of those of a later
version, all that is whole is read.
"""

import io
import json
import math
import uuid
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_aop.errors import InvalidValueError, MissingFileError
from lightning_aop.files import write_whole
from lightning_aop.history.failures import FailureRecord, read_failures

__all__ = ["History", "Record"]

_SIDE = 112  # of a stored map, at most: of 800 maps 10 MB, and finer than any network's layer


@dataclass(frozen=True)
class Record:
    """The explanations made at one time.

    Attributes:
        step: the one that the loggers show; 0 before training.
        epoch: which one, from 0.
        title: when, in words.
        values: the logged metrics by name, without `explain/`.
        images: the index of the image of each explanation.
        targets: the class of each.
        scores: the class score of each.
        blank: which maps show nothing.
        drift: 1 − the rank correlation with the previous map of the same image and class.
        deletion_auc: of each explanation, None where it was not judged.
        insertion_auc: likewise.
        controls: the metrics of each control map, by the control's name; empty where they were not
            measured.
        predicted: the likeliest class of each explanation's image.
        verdicts: what the model said of each against its label: right, wrong, missed, false positive or
            absent; None without labels.
        predicted_scores: the score of that class.
        deletion: the deletion curve of each, None where it was not judged.
        insertion: likewise.
        energy: the share of each map's heat that lies on the object; None without a mask, and for a
            blank map.
        hits: whether its hottest pixel does, a share where several are equally hot; None likewise.
        peaks: where each map is hottest, as shares of the height and the width; None for a blank map.
        away: how far that is from the object, as a share of the longer side; None as for `energy`.
        control_aucs: the overall AUC of each control map for each explanation, by the control's name;
            empty where they were not measured.
        time: when, in seconds since 1970.
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
    predicted_scores: list[float] = field(default_factory=list)
    deletion: list[list[float] | None] = field(default_factory=list)
    insertion: list[list[float] | None] = field(default_factory=list)
    energy: list[float | None] = field(default_factory=list)
    hits: list[float | None] = field(default_factory=list)
    peaks: list[list[float] | None] = field(default_factory=list)
    away: list[float | None] = field(default_factory=list)
    control_aucs: dict[str, list[float | None]] = field(default_factory=dict)
    time: float | None = None
    first: int = 0

    @property
    def end(self) -> int:
        """The place after its last map."""
        return self.first + len(self.images)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The image and the class of each explanation."""
        return list(zip(self.images, self.targets, strict=True))

    def overall_auc(self, place: int) -> float | None:
        """Return insertion minus deletion AUC of one explanation, None where it was not judged."""
        if not self.deletion_auc or not self.insertion_auc:
            return None
        deletion, insertion = self.deletion_auc[place], self.insertion_auc[place]
        return None if deletion is None or insertion is None else insertion - deletion


@dataclass(frozen=True)
class History:
    """All that a run has stored.

    Attributes:
        configuration: settings by name.
        class_names: names by class index.
        images: the images as they are shown.
        masks: where an object is, by image and class; not for all.
        maps: those of all records, 255 for 1.
        records: in their order.
        lost: what can't be read of damaged files, in words.
        epochs: how many the run is to have, None where that is open.
        finished: the run has ended.
        failures: the worst samples of the validations, where the monitor was to follow them.

    A notebook shows it as the page of the run.
    """

    configuration: dict[str, str]
    class_names: dict[int, str]
    images: UInt8[np.ndarray, "n y x 3"]
    masks: dict[tuple[int, int], Bool[np.ndarray, "y x"]]
    maps: UInt8[np.ndarray, "m h w"]
    records: list[Record] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    failures: list[FailureRecord] = field(default_factory=list)
    epochs: int | None = None
    finished: bool = False

    def class_name(self, target: int) -> str:
        """Return the name of a class, or its index in words."""
        return self.class_names.get(target, f"class {target}")

    def _repr_html_(self) -> str:
        from lightning_aop.history.report import inline  # which shows this class

        return inline(self)

    @classmethod
    def load(cls, folder: str | Path) -> "History":
        """Read a folder; maps stay on the disk until they are looked at.

        Records that are damaged are left out, and named in `lost`.

        Raises:
            FileNotFoundError: nothing has been stored there.
            ValueError: the images can't be read.
        """
        folder = Path(folder)
        if not (folder / "run.json").exists():
            raise MissingFileError(
                f"{folder} has no run.json: name the folder `explanations` that a run with an "
                "ExplanationMonitor has written"
            )
        try:
            images = np.load(folder / "images.npy", allow_pickle=False)
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
                raise InvalidValueError(f"has {images.dtype} of shape {images.shape}, no images")
        except Exception as error:
            raise InvalidValueError(
                f"{folder} can't be read: images.npy {_reason(error)}. Resume the run, or start it "
                "again, to have the images stored anew"
            ) from error
        found, lost = readable(folder, len(images)), []
        try:
            about = _about(folder / "run.json")
        except Exception as error:
            about = _About({}, {}, [])
            lost.append(f"run.json can't be read: {_reason(error)}")
        objects: dict[tuple[int, int], Bool[np.ndarray, "y x"]] = {}
        try:
            masks = np.load(folder / "masks.npy", allow_pickle=False)
            if masks.dtype != np.bool_ or masks.shape[1:] != images.shape[1:3]:
                raise InvalidValueError(f"has {masks.dtype} of shape {masks.shape}, no masks")
            objects = dict(zip(about.masks, masks, strict=not lost))
        except Exception as error:
            lost.append(f"masks.npy can't be read: {_reason(error)}")
        return cls(
            about.configuration,
            about.class_names,
            images,
            objects,
            found.maps,
            found.records,
            lost + found.lost,
            failures=read_failures(folder),
            epochs=about.epochs,
            finished=about.finished,
        )


@dataclass(frozen=True)
class _About:
    """What `run.json` says; `masks` are the image and the class of each."""

    configuration: dict[str, str]
    class_names: dict[int, str]
    masks: list[tuple[int, int]]
    epochs: int | None = None
    finished: bool = False


def _about(path: Path) -> _About:
    about = json.loads(path.read_text(encoding="utf-8"))
    epochs = about.get("epochs")
    return _About(
        {str(name): str(value) for name, value in about["configuration"].items()},
        {int(index): str(name) for index, name in about["class_names"].items()},
        [(int(image), int(target)) for image, target in about["masks"]],
        epochs if _is_count(epochs) else None,
        about.get("finished") is True,
    )


@dataclass(frozen=True)
class Readable:
    """The records of a folder that are whole, and what is not.

    Attributes:
        records: in their order, each with its place in `maps`.
        maps: those that are there.
        lost: what can't be read, in words.
        unknown: the names of fields of a later version, which are passed over.
    """

    records: list[Record]
    maps: UInt8[np.ndarray, "m h w"]
    lost: list[str] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)


def readable(folder: Path, images: int, count: int | None = None) -> Readable:
    """Return the records that can be read; no damage is an error.

    Args:
        folder: where they are.
        images: how many images they may be of.
        count: how many there must be at least, of which no more are read; all by default.
    """
    nothing = np.zeros((0, 1, 1), dtype=np.uint8)
    try:
        # Before the maps: what is added in between has its maps, then.
        lines = (folder / "history.jsonl").read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        lines = []
    except Exception as error:
        return Readable([], nothing, [f"history.jsonl can't be read: {_reason(error)}"])
    # A process that was killed leaves a last line without its end.
    lines = [line for line in lines if line.endswith(b"\n")][:count]
    lost = []
    if count is not None and len(lines) < count:
        lost.append(f"history.jsonl has {len(lines)} records, not {count}")
    if not lines:
        return Readable([], nothing, lost)
    try:
        maps = _maps(folder / "maps.npy")
    except Exception as error:
        return Readable([], nothing, [*lost, f"maps.npy can't be read: {_reason(error)}"])
    records: list[Record] = []
    unknown: set[str] = set()
    damaged: list[str] = []
    for number, line in enumerate(lines, start=1):
        try:
            record, others = _record(line, images)
            if record.end > len(maps):
                raise InvalidValueError(f"its maps end at {record.end}, the file at {len(maps)}")
        except Exception as error:
            damaged.append(f"line {number}: {_reason(error)}")
        else:
            records.append(record)
            unknown |= others
    if damaged:
        lost.append(f"{len(damaged)} of {len(lines)} records can't be read, such as {damaged[0]}")
    return Readable(records, maps, lost, unknown)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, InvalidValueError) else f"{type(error).__name__} {text}"


def _maps(path: Path) -> UInt8[np.ndarray, "m h w"]:
    """Return the maps of a file without reading them; if it was cut, those that are whole."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        (many, *size), fortran, dtype = np.lib.format.read_array_header_1_0(file)
        start = file.tell()
    if len(size) != 2 or 0 in size or fortran or dtype != np.uint8:
        raise InvalidValueError(f"has {dtype} of shape {(many, *size)}, no maps")
    whole = (path.stat().st_size - start) // math.prod(size)
    return np.memmap(path, np.uint8, "r", start, (min(many, whole), *size))


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_count(value)


def _is_number_or_none(value: object) -> bool:
    return value is None or _is_number(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_text_or_none(value: object) -> bool:
    return value is None or isinstance(value, str)


def _are_numbers_or_none(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(map(_is_number, value)))


def _are_values(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_number_or_none, value.values()))


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "epoch": _is_count,
    "title": lambda value: isinstance(value, str),
    "values": _are_values,
    "controls": lambda value: isinstance(value, dict) and all(map(_are_values, value.values())),
    "time": _is_number_or_none,
    "first": _is_count,
}
"""What the fields of a record must be."""

_OF_EACH: dict[str, Callable[[object], bool]] = {
    "images": _is_count,
    "targets": _is_count,
    "scores": _is_number,
    "blank": _is_bool,
    "drift": _is_number_or_none,
    "deletion_auc": _is_number_or_none,
    "insertion_auc": _is_number_or_none,
    "predicted": _is_count,
    "verdicts": _is_text_or_none,
    "predicted_scores": _is_number,
    "deletion": _are_numbers_or_none,
    "insertion": _are_numbers_or_none,
    "peaks": _are_numbers_or_none,
    "away": _is_number_or_none,
    "energy": _is_number_or_none,
    "hits": _is_number_or_none,
    "control_aucs": _is_number_or_none,
}
"""What the entries of its lists must be, of which there is one for each explanation."""


def _record(line: bytes, images: int) -> tuple[Record, set[str]]:
    """Return the record of a line, and the names of the fields that are not known."""
    found = json.loads(line)
    if not isinstance(found, dict):
        raise InvalidValueError(f"is a {type(found).__name__}, no record")
    known = {
        each.name: each.name == "time" or each.default_factory is not MISSING
        for each in fields(Record)
    }
    own = {name: value for name, value in found.items() if name in known}
    if missing := [name for name, optional in known.items() if not optional and name not in own]:
        raise InvalidValueError(f"has no {missing[0]}")
    for name, value in own.items():
        if name in _CHECKS:
            fits = _CHECKS[name](value)
        else:
            lists = value.values() if name == "control_aucs" else [value]
            fits = all(isinstance(each, list) and all(map(_OF_EACH[name], each)) for each in lists)
            # Earlier versions did not know what the model predicted, and maps need not be judged.
            optional = known[name] or name.endswith("_auc")
            count = len(own["images"])
            fits = fits and all(len(each) == count or (optional and not each) for each in lists)
        if not fits:
            raise InvalidValueError(f"{name} can't be {str(value)[:80]}")
    record = Record(**own)
    if max(record.images, default=0) >= images:
        raise InvalidValueError(f"is of image {max(record.images)}, there are {images}")
    for figures in (record.values, *record.controls.values()):
        figures.update({n: math.nan for n, v in figures.items() if v is None})
    return record, found.keys() - known.keys()


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
        epochs: int | None = None,
    ) -> None:
        masks = masks or {}
        self.folder = folder
        self.records = 0
        self._first: Record | None = None
        self._last: Record | None = None
        self._bytes = 0
        self._told: dict[str, Any] = {
            "configuration": dict(configuration),
            "class_names": dict(class_names),
            "masks": list(masks),
            "epochs": epochs,
            "finished": False,
            "writer": uuid.uuid4().hex,  # tells who has written here last
        }
        folder.mkdir(parents=True, exist_ok=True)
        _save(folder / "images.npy", images.permute(0, 2, 3, 1).contiguous().cpu().numpy())
        shape = (0, *images.shape[2:])
        found = torch.stack(list(masks.values())).cpu() if masks else torch.zeros(shape).bool()
        _save(folder / "masks.npy", found.numpy())
        self._tell()
        self._sizes = {name: self._size(name) for name in ("images.npy", "masks.npy")}

    def keep(self, earlier: Readable) -> None:
        """Begin with these records, which may be of another folder, or of this one."""
        records: list[Record] = []
        for record in earlier.records:
            records.append(replace(record, first=records[-1].end if records else 0))
        self._first, self._last = (records[0], records[-1]) if records else (None, None)
        parts = [earlier.maps[record.first : record.end] for record in earlier.records]
        _save(self.folder / "maps.npy", np.concatenate([earlier.maps[:0], *parts]))
        lines = "".join(map(_line, records)).encode()
        write_whole(self.folder / "history.jsonl", lines)
        self.records, self._bytes = len(records), len(lines)
        self._note_sizes()

    def finish(self) -> None:
        """Note that the run has ended."""
        self._told["finished"] = True
        self._tell()

    def _tell(self) -> None:
        self._about = json.dumps(self._told, indent=1).encode()
        write_whole(self.folder / "run.json", self._about)

    def is_whole(self) -> bool:
        """Tell whether all files are there as they were left, and nobody else has written them."""
        try:
            return (self.folder / "run.json").read_bytes() == self._about and all(
                self._size(name) >= size for name, size in self._sizes.items()
            )
        except OSError:
            return False

    def _size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def _note_sizes(self) -> None:
        self._sizes |= {name: self._size(name) for name in ("maps.npy", "history.jsonl")}

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
        self._note_sizes()

    @property
    def _next(self) -> int:
        return 0 if self._last is None else self._last.end

    def earlier_maps(self) -> list[tuple[str, dict[tuple[int, int], UInt8[np.ndarray, "h w"]]]]:
        """Return the title of the first record and of the last, each with its maps by image and class.

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
    # JSON has no NaN; a record's metrics that are not finite are None in the file.
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

    NumPy leaves space in the header for the first number of the shape to grow. It is written last:
    until then a reader sees the array as it was.
    """
    with path.open("r+b") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if shape[1:] != maps.shape[1:] or dtype != maps.dtype:
            raise InvalidValueError(f"{path} has maps of {shape[1:]}, not of {maps.shape[1:]}")
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
