"""The images of a benchmark: ImageNet in its usual layouts, or any folder with a table of labels."""

import csv
import hashlib
import io
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from lightning_aop.errors import InvalidValueError, MissingPackageError
from lightning_aop.files import read_text

OFFICIAL = "ILSVRC2012_validation_ground_truth.txt"
_WNID = re.compile(r"n\d{8}")
_COLUMNS = ("class_index", "label", "class", "target")


class Picture(NamedTuple):
    """A file, relative to the root, with the index of its class among the network's."""

    file: str
    label: int


@dataclass(frozen=True)
class Pictures:
    """Which images, and how they become input.

    Attributes:
        root: their folder; environment variables in it are filled in. Its layout is one of
            - folders named by class, whose sorted order is the order of the classes: ImageNet's 1,000
              wnids, or those of any other classifier (torchvision's ImageFolder);
            - ImageNet's flat validation folder, with the ground truth that `labels` names;
            - any folder with a `labels.csv`, whose columns `file` and `class_index` name them.

            Where `root` has a folder `val`, that is meant.
        labels: a CSV file; or a text file for a flat folder, a line for each image in the order of
            their names: the official ILSVRC2012_validation_ground_truth.txt, which needs the meta.mat
            that comes with it beside it, or wnids; or lines of `FILE INDEX`. By default looked for in
            `root` and beside it.
        classes: a file with the classes in the network's order, a line for each, which starts with the
            name of the folder (LOC_synset_mapping.txt is one): needed for a part of ImageNet's folders.
        limit: the first images only; a run with a higher limit goes on from one with a lower.
        shuffle_seed: put them into a random order first, so that `limit` takes a sample; None for the
            order of their names.
        size: height and width of the input, in pixels.
        resize: "squash" the image into the square, as the paper does, or "crop" the middle of it.
        value_range: the values that are black and white, for greyscale images of more than 8 bits.
        num_workers: processes that read images.
    """

    root: str
    labels: str | None = None
    classes: str | None = None
    limit: int | None = None
    shuffle_seed: int | None = None
    size: int = 224
    resize: Literal["squash", "crop"] = "squash"
    value_range: tuple[float, float] | None = None
    num_workers: int = 0
    folder: Path = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InvalidValueError(f"data.limit must be at least 1, got {self.limit}")
        object.__setattr__(self, "folder", _folder(self.root))

    def listed(self) -> list[Picture]:
        """Return the images in the order of the run, all of them whatever the limit.

        Raises:
            ValueError: the layout is none of those known, or files and labels don't fit.
            OSError: a file can't be read.
        """
        found = self._by_labels() if (file := self._labels()) is None else self._labelled(file)
        if not found:
            raise InvalidValueError(f"{self.folder} holds no images ({', '.join(IMG_EXTENSIONS)})")
        if self.shuffle_seed is not None:
            random.Random(self.shuffle_seed).shuffle(found)
        return found

    def _labels(self) -> Path | None:
        if self.labels is not None:
            path = _expanded(self.labels)
            if not path.is_file():
                raise InvalidValueError(f"data.labels {path}: no such file")
            return path
        named = ("labels.csv", OFFICIAL, f"data/{OFFICIAL}", "val.txt")
        for folder in (self.folder, self.folder.parent):
            for name in named if folder == self.folder else named[1:]:
                if (folder / name).is_file() and _flat(self.folder):
                    return folder / name
        return None

    def _by_labels(self) -> list[Picture]:
        """Return the images of folders named by class."""
        folders = sorted(
            entry.name
            for entry in self.folder.iterdir()
            if entry.is_dir() and not entry.name.startswith(".")  # .ipynb_checkpoints is no class
        )
        if not folders:
            raise InvalidValueError(
                f"{self.folder} has neither folders named by class nor labels: name a file with "
                "data.labels, a CSV with the columns file and class_index, or ImageNet's "
                f"{OFFICIAL}"
            )
        if self.classes is not None:
            lines = read_text(_expanded(self.classes), "data.classes").splitlines()
            index = {line.split()[0].rstrip(","): i for i, line in enumerate(lines) if line.split()}
        elif len(folders) != 1000 and all(map(_WNID.fullmatch, folders)):
            raise InvalidValueError(
                f"{self.folder} holds {len(folders)} of ImageNet's 1,000 classes: name a file that "
                "lists all of them in order, with data.classes (such as LOC_synset_mapping.txt)"
            )
        else:
            index = {name: i for i, name in enumerate(folders)}
        if unknown := [name for name in folders if name not in index]:
            raise InvalidValueError(
                f"{self.folder / unknown[0]}: {self.classes} lists no such class"
            )
        return [
            Picture(path.relative_to(self.folder).as_posix(), index[name])
            for name in folders
            for path in sorted((self.folder / name).rglob("*"))
            if path.suffix.lower() in IMG_EXTENSIONS
        ]

    def _labelled(self, file: Path) -> list[Picture]:
        if file.suffix.lower() == ".csv":
            return _from_csv(file)
        lines = [
            line.split() for line in read_text(file, "data.labels").splitlines() if line.strip()
        ]
        if lines and len(lines[0]) == 2:
            return [Picture(name, _whole(index, file)) for name, index in lines]
        files = _flat(self.folder)
        if len(files) != len(lines):
            raise InvalidValueError(
                f"{file} has {len(lines)} labels for the {len(files)} images in {self.folder}: "
                "they must be of one set"
            )
        words = [line[0] for line in lines]
        if all(map(_WNID.fullmatch, words)):
            known = sorted(set(words))
            if len(known) != 1000:
                raise InvalidValueError(
                    f"{file} names {len(known)} of ImageNet's 1,000 classes, not all"
                )
            index = {wnid: i for i, wnid in enumerate(known)}
        else:
            index = _official_ids(file)
        try:
            return [Picture(name, index[word]) for name, word in zip(files, words, strict=True)]
        except KeyError as error:
            raise InvalidValueError(f"{file}: {error} is no class of ILSVRC2012's 1,000") from error


def fingerprint(folder: Path, pictures: Sequence[tuple[str, int | None]]) -> str:
    """Return a digest of a list of images: names, labels and sizes of the files, but not their times."""
    digest = hashlib.sha256()
    for name, label in pictures:
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        digest.update(f"{name}\t{label}\t{size}\n".encode())
    return digest.hexdigest()


def _expanded(path: str) -> Path:
    return Path(os.path.expandvars(path)).expanduser()


def _folder(root: str) -> Path:
    folder = _expanded(root)
    if not folder.is_dir():
        raise InvalidValueError(f"data.root {folder}: no such folder")
    return folder / "val" if (folder / "val").is_dir() else folder


def _flat(folder: Path) -> list[str]:
    entries = (e for e in os.scandir(folder) if e.name.lower().endswith(IMG_EXTENSIONS))
    return sorted(entry.name for entry in entries)


def _from_csv(file: Path) -> list[Picture]:
    rows = list(csv.DictReader(io.StringIO(read_text(file, "data.labels"), newline="")))
    names = rows[0].keys() if rows else ()
    column = next((name for name in _COLUMNS if name in names), None)
    if "file" not in names or column is None:
        raise InvalidValueError(
            f"{file} must have the columns file and class_index, got {', '.join(names) or 'none'}"
        )
    return [Picture(row["file"], _whole(row[column], file)) for row in rows]


def _whole(text: str | None, file: Path) -> int:
    try:
        return int(text or "")
    except ValueError as error:
        raise InvalidValueError(f"{file}: {text!r} is no index of a class") from error


def _official_ids(file: Path) -> dict[str, int]:
    """Return the index of each ILSVRC2012_ID: its wnid's place in the sorted order of all 1,000."""
    meta = file.parent / "meta.mat"
    if not meta.is_file():
        raise InvalidValueError(
            f"{file} needs the meta.mat of ILSVRC2012's development kit beside it, which says what "
            "its numbers stand for; or give lines of FILE INDEX, or wnids"
        )
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise MissingPackageError(
            'meta.mat needs scipy: install it with pip install "lightning-aop[benchmark]"'
        ) from error
    synsets: Any = loadmat(meta, squeeze_me=True)["synsets"]
    leaves = synsets[synsets["num_children"] == 0]
    order = {wnid: i for i, wnid in enumerate(sorted(map(str, leaves["WNID"])))}
    return {
        str(int(number)): order[str(wnid)]
        for number, wnid in zip(leaves["ILSVRC2012_ID"], leaves["WNID"], strict=True)
    }
