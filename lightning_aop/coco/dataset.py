"""Images and instance masks in COCO's format, read for multilabel training with pycocotools."""

import contextlib
import copy
import gzip
import hashlib
import importlib
import io
import json
import math
import os
import unicodedata
import urllib.parse
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lightning_aop.data.images import ImageError, ValueRange, read_image, to_tensor
from lightning_aop.errors import InvalidValueError, MissingFileError, MissingPackageError

Transform: TypeAlias = Callable[[Image.Image], Tensor]

_LISTS = ("images", "annotations", "categories")


class NoMaskError(InvalidValueError):
    """An instance whose place is not known: it has no mask, or one that covers nothing."""


class CocoMultilabel(Dataset[tuple[Tensor, Tensor]]):
    """COCO-format photos as (image, label) pairs, with the masks of each class on demand.

    An image has a class if one of its annotations does. The label is multi-hot, 0 or 1 for each
    class; where `on_error` is "skip", an image that can't be read becomes zeros with a label of −1
    for every class, which losses and metrics leave out (torchmetrics: `ignore_index=-1`).

    Args:
        images: the folder of the images; nothing outside it is read.
        annotations: the JSON file of the instances.
        transform: turns the RGB image into the tensor that the model takes; by default it becomes
            a float tensor in [0, 1] at the image's own size. Masks follow it if it has a method
            `masks`, as `Preprocess` does.
        keep_empty: keep images without annotations, negative for every class.
        crowds: let crowd annotations (`iscrowd`) count, in labels and in masks.
        on_error: "raise", or "skip" what can't be read.
        value_range: the values that are black and white, for greyscale images of more than 8 bits.
        links: read images that are links out of the folder, as some tools export them.
        exif: turn images as their EXIF data says, as browsers and most annotation tools do; an image
            whose annotated size is the stored one stays as it is stored.

    Attributes:
        classes: the names of the classes, by the order of their category ids; categories of one name
            are one class.
        labels: [N, K], which image has which class.
        ids: the image ids, ascending, in the order of the dataset.

    Raises:
        ImportError: pycocotools is not installed.
        FileNotFoundError: the folder or the file is missing.
        ValueError: the file is no COCO instances file, or names what it doesn't list.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path,
        transform: Transform | None = None,
        *,
        keep_empty: bool = True,
        crowds: bool = True,
        on_error: Literal["raise", "skip"] = "raise",
        value_range: ValueRange | None = None,
        links: bool = False,
        exif: bool = True,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise InvalidValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        self.folder, self.file = Path(images), Path(annotations)
        self.transform: Transform = transform or to_tensor
        self.crowds, self.value_range = crowds, value_range
        self.on_error, self.links, self.exif = on_error, links, exif
        coco = _read(self.folder, self.file)
        categories = sorted(coco.cats)
        names = {c: str(coco.cats[c].get("name", c)) for c in categories}
        self.classes: list[str] = list(dict.fromkeys(names.values()))
        self._column = {category: self.classes.index(name) for category, name in names.items()}
        ids = sorted(coco.imgs)
        row = {image: index for index, image in enumerate(ids)}
        labels = torch.zeros(len(ids), len(self.classes), dtype=torch.bool)
        pairs = [
            (row[annotation["image_id"]], self._column[annotation["category_id"]])
            for annotation in coco.dataset["annotations"]
            if crowds or not annotation.get("iscrowd")
        ]
        if pairs:
            labels[tuple(torch.tensor(pairs).T)] = True
        kept = range(len(ids)) if keep_empty else labels.any(dim=1).nonzero()[:, 0].tolist()
        self.ids: list[Any] = [ids[index] for index in kept]
        self.labels: Bool[Tensor, "n k"] = labels[kept]
        self.files: list[str] = [str(coco.imgs[i]["file_name"]) for i in self.ids]
        sizes = ((coco.imgs[i].get("width"), coco.imgs[i].get("height")) for i in self.ids)
        self._sizes = [None if None in size else size for size in sizes]
        # Set by whichever worker meets a bad image, and seen by the process that reports it.
        self._skipped = torch.zeros(len(self.ids), dtype=torch.bool).share_memory_()
        self._has_masks = any(a.get("segmentation") for a in coco.dataset["annotations"])
        self._coco: Any = coco

    @classmethod
    def from_root(
        cls,
        root: str | Path,
        split: str = "train2017",
        transform: Transform | None = None,
        **options: Any,
    ) -> "CocoMultilabel":
        """Open a split of a folder in COCO's own layout, or in one of its common variants.

        The images lie in `root/SPLIT` or `root/images/SPLIT`; the annotations are
        `root/annotations/instances_SPLIT.json`, `root/annotations/SPLIT.json` or
        `root/SPLIT/_annotations.coco.json`. `options` are those of the class.
        """
        root = Path(root)
        # A split is part of a path: it must not lead out of the root either.
        _check_inside(split, f"split {split!r}", root)
        folders = [root / split, root / "images" / split]
        files = [
            root / "annotations" / f"instances_{split}.json",
            root / "annotations" / f"{split}.json",
            root / split / "_annotations.coco.json",
        ]
        folder = next((f for f in folders if f.is_dir()), folders[0])
        file = next((f for f in files if f.is_file()), files[0])
        return cls(folder, file, transform, **options)

    def part(self, rows: Sequence[int]) -> "CocoMultilabel":
        """Return the images of these rows as a data set of its own."""
        part = copy.copy(self)
        for name in ("ids", "files", "_sizes"):
            setattr(part, name, [getattr(self, name)[row] for row in rows])
        part.labels = self.labels[list(rows)]
        part._skipped = torch.zeros(len(rows), dtype=torch.bool).share_memory_()
        return part

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Float[Tensor, " k"]]:
        try:
            return self.transform(self.image(index)), self.labels[index].float()
        except ImageError:
            if self.on_error == "raise":
                raise
            self._skipped[index] = True
            blank = self.transform(Image.new("RGB", self._sizes[index] or (64, 64)))
            return torch.zeros_like(blank), torch.full((len(self.classes),), -1.0)

    def __getstate__(self) -> dict[str, Any]:
        """Leave pycocotools' index behind: a worker needs it for masks only, and reads it then."""
        return self.__dict__ | {"_coco": None}

    @property
    def coco(self) -> Any:
        """Pycocotools' index of the annotations."""
        if self._coco is None:
            self._coco = _read(self.folder, self.file)
        return self._coco

    def image(self, index: int) -> Image.Image:
        """Return the image in RGB, in the geometry that its masks fit.

        Raises:
            ImageError: it can't be read, or has another size than the annotations say.
        """
        path, image = self.folder / self.files[index], self.ids[index]
        remedy = "restore the file, or take the image out of the annotations"
        try:
            root = None if self.links else self.folder
            return read_image(path, self._sizes[index], self.value_range, root, self.exif)
        except ImageError as error:
            if error.link:
                remedy = "copy the file there, or follow links with links=True (--data.links true)"
            raise ImageError(
                f"{path}, image {image} of {self.file}: {error}; {remedy}, or leave "
                "it out with on_error='skip'"
            ) from error

    def fingerprint(self) -> str:
        """Return a hash of the name, size and time of every image, which changes when one does."""
        digest = hashlib.sha256(repr(self._sizes).encode())
        for name in self.files:
            path = self.folder / name
            stat = path.stat() if path.is_file() else None
            digest.update(f"{name}\n{stat and (stat.st_size, stat.st_mtime_ns)}\n".encode())
        return digest.hexdigest()

    def mark_skipped(self, bad: Bool[Tensor, " n"]) -> None:
        """Note images that could not be read elsewhere."""
        self._skipped |= bad

    def skipped(self) -> list[str]:
        """Return what was left out so far, a line for each image, with the reason."""
        lines = []
        for index in self._skipped.nonzero()[:, 0].tolist():
            try:
                self.image(index)
            except ImageError as error:
                lines.append(str(error).removesuffix(", or leave it out with on_error='skip'"))
            else:
                lines.append(
                    f"{self.folder / self.files[index]}, image {self.ids[index]} of {self.file}: it "
                    "was left out, but can be read now; run again to have it in"
                )
        return lines

    def masks(
        self, index: int, classes: Sequence[int] | None = None, boxes: bool = False
    ) -> Bool[np.ndarray, "classes h w"]:
        """Return where each class is: the union of its instances, at the image's own size.

        An instance without a segmentation is its box, if others in the file have one.

        Args:
            index: which image.
            classes: which classes; all by default.
            boxes: the boxes of the instances instead, as for VOC; without a box it is that of its
                segmentation.

        Raises:
            NoMaskError: an annotation has no segmentation, or one that covers nothing.
            ValueError: an annotation has a broken segmentation.
        """
        classes = range(len(self.classes)) if classes is None else classes
        width, height = self._sizes[index] or self.image(index).size
        masks = np.zeros((len(classes), height, width), dtype=bool)
        for annotation in self.coco.imgToAnns.get(self.ids[index], []):
            column = self._column[annotation["category_id"]]
            if column in classes and (self.crowds or not annotation.get("iscrowd")):
                box = self._has_masks or boxes
                if boxes and _is_box(annotation.get("bbox")):
                    annotation = {**annotation, "segmentation": None}
                mask = _decoded(annotation, height, width, self.file, box)
                if boxes:
                    mask = np.outer(_reach(mask, 1), _reach(mask, 0))
                masks[classes.index(column)] |= mask
        return masks

    def input_masks(
        self, index: int, classes: Sequence[int] | None = None
    ) -> Bool[Tensor, "classes h w"]:
        """Return the masks in the geometry of the tensor that the dataset gives for this image."""
        masks = self.masks(index, classes)
        follow = getattr(self.transform, "masks", None)
        if follow is not None:
            followed: Tensor = follow(masks)
            return followed
        if self.transform is not to_tensor:
            raise InvalidValueError(
                f"the masks can't follow the transform {self.transform!r}: give it a method "
                "masks(array [K, h, w]) -> tensor [K, H, W], or take coco.Preprocess"
            )
        return torch.from_numpy(masks)


def index_class() -> Any:
    """Return pycocotools' class of an index.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("pycocotools.coco").COCO
    except ImportError as error:
        raise MissingPackageError(
            'CocoMultilabel reads annotations with pycocotools: pip install "lightning-aop[coco]"'
        ) from error


def _read(folder: Path, file: Path) -> Any:
    """Return pycocotools' index of the file, with all that it refers to checked."""
    coco_class = index_class()
    if not folder.is_dir():
        raise MissingFileError(
            f"{folder} is no folder: give the one that holds the images, such as train2017"
        )
    if not file.is_file():
        raise MissingFileError(
            f"{file} is no file: give the annotations, such as instances_train2017.json"
        )
    text = b""
    try:
        # COCO() would read in the encoding of the system; of bytes the encoding is detected.
        text = _unzipped(file)
        content = json.loads(text)
    except InvalidValueError:
        raise
    except UnicodeDecodeError as error:
        raise InvalidValueError(f"{file} is not in UTF-8 ({error}): save it as UTF-8") from error
    except (ValueError, RecursionError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        other = next((kind for start, kind in _STARTS if text.lstrip().startswith(start)), None)
        raise InvalidValueError(
            f"{file} is {other}: {_EXPORT}"
            if other
            else f"{file} is no valid JSON ({error}): it may be cut short, copy or export it again"
        ) from error
    _check_lists(content, file)
    _normalise(content, folder)
    _check(content, file, folder)
    coco = coco_class()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


_EXPORT = "let the tool export COCO's format (instances), a JSON file with images and annotations"
_STARTS = ((b"<", "XML, as of Pascal VOC or CVAT"), (b"PK", "a ZIP archive, to be unpacked first"))

# All of COCO's annotations together have not half as much.
_MOST = 2 << 30


def _unzipped(file: Path) -> bytes:
    """Return the content of a file, also of one that gzip has packed."""
    with file.open("rb") as opened:
        packed = opened.read(2) == b"\x1f\x8b"
    if not packed:
        return file.read_bytes()
    text = bytearray()
    with gzip.open(file) as unpacked:
        while part := unpacked.read(1 << 20):
            text += part
            if len(text) > _MOST:
                raise InvalidValueError(f"{file} has more than {_MOST >> 30} GiB: split it")
    return bytes(text)


def _check_lists(content: Any, file: Path) -> None:
    if isinstance(content, dict) and {"shapes", "imagePath"} <= set(content):
        raise InvalidValueError(
            f"{file} is labelme's file of one image: {_EXPORT}; labelme2coco does"
        )
    for name in _LISTS:
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise InvalidValueError(
                f"{file} has no list '{name}' of objects: give an instances file, such as "
                f"instances_train2017.json; {_EXPORT}"
            )


def _normalise(content: dict[str, Any], folder: Path) -> None:
    """Write as COCO does what labelling tools write in another way that can mean one thing only."""
    for name in _LISTS:
        for entry in content[name]:
            entry.update({k: _whole(entry[k]) for k in _NUMBERS if k in entry})
    for name in ("images", "categories"):  # merged files repeat them, with another date or licence
        first: dict[str, Any] = {}
        content[name] = [
            entry
            for entry in content[name]
            if (known := first.setdefault(str(entry.get("id")), entry)) is entry
            or any(known.get(key) != entry.get(key) for key in _TELLING)
        ]
    drawn: dict[str, tuple[int, int] | None] = {}
    for number, annotation in enumerate(content["annotations"]):
        # Nothing refers to it; pycocotools wants one.
        annotation.setdefault("id", number)
        size = _drawn_size(annotation.get("segmentation"))
        drawn[str(annotation.get("image_id"))] = size or drawn.get(str(annotation.get("image_id")))
    files = _Files(folder)
    for image in content["images"]:
        _read_size(image)
        # A run-length code was drawn on the picture as the tool showed it.
        if image.get("width") is None and (size := drawn.get(str(image.get("id")))):
            image["height"], image["width"] = size
        name = image.get("file_name")
        places = (image.get(k) for k in ("coco_url", "flickr_url", "path", "url"))
        url = name if "://" in str(name) else next((place for place in places if place), None)
        if (name is None or name is url) and isinstance(url, str):
            path = urllib.parse.unquote(url.partition("?")[0])
            near = "/".join(path.split("/")[-2:])
            image["file_name"] = near if near in files else path.rpartition("/")[2]
        if isinstance(name := image.get("file_name"), str):
            image["file_name"] = files.meant(name)
    listed = {
        f"{key}_id": {str(entry.get("id")): entry.get("id") for entry in content[name]}
        for key, name in (("image", "images"), ("category", "categories"))
    }
    for annotation in content["annotations"]:
        for key, ids in listed.items():
            # 1 and "1" are the same id, where the file has no other that reads so.
            if isinstance(value := annotation.get(key), (int, str)) and str(value) in ids:
                annotation[key] = ids[str(value)]


# What makes two entries of one id different.
_TELLING = ("file_name", "coco_url", "path", "url", "width", "height", "name", "supercategory")
# What some tools write as 60.0.
_NUMBERS = ("id", "image_id", "category_id", "width", "height")


def _read_size(image: dict[str, Any]) -> None:
    """Read the width and height of an image where they are text, or 0 for unknown."""
    sides = [image.get(side) for side in ("width", "height")]
    if any(isinstance(side, str) for side in sides):
        sides = [_whole(_number(side)) for side in sides]
    if sides == [0, 0]:
        sides = [None, None]
    image.update(
        {k: side for k, side in zip(("width", "height"), sides, strict=True) if k in image}
    )


def _number(value: object) -> object:
    """Return the number that a text writes, and anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _polygons(segmentation: list[Any]) -> list[Any]:
    """Return polygons as COCO writes them: of corners in pairs or under x and y, or as text."""
    corners = [_corner(each) for each in segmentation]
    if len(corners) > 2 and all(corner is not None for corner in corners):
        segmentation = [[side for corner in corners for side in corner or ()]]
    flat = []
    for polygon in segmentation:
        if isinstance(polygon, list) and polygon and isinstance(polygon[0], (list, dict)):
            inside = [_corner(each) for each in polygon]
            polygon = [side for corner in inside for side in corner or (None,)]
        flat.append([_number(v) for v in polygon] if isinstance(polygon, list) else polygon)
    return flat


def _corner(value: object) -> list[Any] | None:
    """Return x and y, None where it is no corner."""
    if isinstance(value, dict):
        return [value["x"], value["y"]] if set(value) == {"x", "y"} else None
    return value if isinstance(value, list) and len(value) == 2 else None


def _whole(value: object) -> object:
    """Return 60 for 60.0, and anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _drawn_size(segmentation: object) -> tuple[int, int] | None:
    """Return the height and width that a run-length code was drawn at."""
    size = segmentation.get("size") if isinstance(segmentation, dict) else None
    if not isinstance(size, list) or len(size) != 2:
        return None
    whole = all(type(side) is int and 0 < side < 1 << 13 for side in size)
    return (size[0], size[1]) if whole else None


class _Files:
    """Which file a name means: that of the name, or the only one that it can be another spelling of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lists: dict[str, set[str]] = {}
        self._spellings: dict[str, list[str]] | None = None

    def __contains__(self, name: str) -> bool:
        # A folder is listed once: asking for every file of a large one takes long on a network.
        head, _, last = name.rpartition("/")
        if head not in self._lists:
            try:
                self._lists[head] = set(os.listdir(self.folder / head)) if _safe(head) else set()
            except (OSError, ValueError):
                self._lists[head] = set()
        return last in self._lists[head]

    def meant(self, name: str) -> str:
        """Return the name of the file; the name itself where there is none, or more than one."""
        forward = name.replace("\\", "/")
        spellings = [name, forward, forward.removeprefix(f"{self.folder.name}/")]
        spellings += [name.strip(), urllib.parse.unquote(forward)]
        for root in {str(self.folder), str(self.folder.resolve())}:
            if forward.startswith(f"{Path(root).as_posix()}/"):
                spellings.append(forward[len(root) + 1 :])
        elsewhere = not _inside(forward)
        spellings = [spelling for spelling in spellings if _inside(spelling)]
        if found := next((s for s in spellings if os.sep == "/" and s in self), None):
            return found
        if self._spellings is None:
            self._spellings = self._all()
        unfinished = [] if PureWindowsPath(forward).suffix else [f"{forward}.*"]
        for spelling in (*spellings, *unfinished):
            near = self._spellings.get(_folded(spelling), [])
            if len(near) == 1:
                return near[0]
        if elsewhere and (last := _folded(urllib.parse.unquote(forward.rpartition("/")[2]))):
            # The place on the tool's server, or on another machine.
            near = self._spellings.get(f"*/{last}", [])
            if len(near) == 1:
                return near[0]
        return name

    def _all(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for top, _, names in os.walk(self.folder):
            base = Path(top).relative_to(self.folder).as_posix()
            for name in names:
                path = name if base == "." else f"{base}/{name}"
                stem = f"{os.path.splitext(path)[0]}.*"
                for key in (_folded(path), f"*/{_folded(name)}", _folded(stem)):
                    found.setdefault(key, []).append(path)
        return found


def _safe(head: str) -> bool:
    return not head or _inside(head)


def _folded(name: str) -> str:
    """Return a name without what file systems differ in: case, and letters with accents in parts."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _check(content: Any, file: Path, folder: Path) -> None:
    """Refuse what the index, an image or a mask would stumble over, in words for the user."""
    for name in _LISTS:
        _check_ids(file, name, [entry.get("id") for entry in content[name]])
    for image in content["images"]:
        where = f"{file}: image {image['id']} has"
        name = image.get("file_name")
        _check_inside(name, f"{where} file_name {name!r}, which", folder)
        sides = [image[key] for key in ("width", "height") if image.get(key) is not None]
        if not all(type(side) is int and 0 < side < 1 << 16 for side in sides):
            raise InvalidValueError(
                f"{where} width and height {sides}, which must be whole numbers of pixels from 1 to "
                "65535: correct them"
            )
        # Masks are made at the annotated size, and Pillow reads no larger image.
        if math.prod(sides) > (limit := Image.MAX_IMAGE_PIXELS or math.inf) and len(sides) == 2:
            raise InvalidValueError(
                f"{where} width and height {sides}, which is more than {limit} pixels: correct "
                "them, or raise PIL.Image.MAX_IMAGE_PIXELS"
            )
    references = {
        f"{key}_id": {entry["id"] for entry in content[name]}
        for key, name in (("image", "images"), ("category", "categories"))
    }
    _check_names(content, file)
    for annotation in content["annotations"]:
        for key, known in references.items():
            value = annotation.get(key)
            if not isinstance(value, (int, float, str)) or value not in known:
                raise InvalidValueError(
                    f"{file}: annotation {annotation['id']} has {key} {value!r}, which the file "
                    "does not list: add it, or take the annotation out"
                )


def _check_names(content: Any, file: Path) -> None:
    """Refuse categories of one name that are of different kinds, and so perhaps not one class."""
    used = {str(a.get("category_id")) for a in content["annotations"]}
    kinds: dict[str, Any] = {}
    for category in content["categories"]:
        kind, name = category.get("supercategory"), str(category.get("name", category["id"]))
        if kind and str(category["id"]) in used and kinds.setdefault(name, kind) != kind:
            raise InvalidValueError(
                f"{file}: two categories have the name {name!r}, one of {kinds[name]!r} and one of "
                f"{kind!r}: rename one, or give both one supercategory to make them one class"
            )


def _check_ids(file: Path, name: str, ids: list[Any]) -> None:
    """Refuse ids that are not unique, or can't be sorted."""
    kinds = {type(i) for i in ids}
    if kinds - {int} and kinds - {str}:
        odd = next(i for i in ids if type(i) is not int)
        raise InvalidValueError(
            f"{file}: the list '{name}' has the id {odd!r}, where ids are whole numbers: correct it"
        )
    # Merged files repeat the ids of annotations, to which nothing refers.
    if name != "annotations" and len(set(ids)) < len(ids):
        seen: set[Any] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        raise InvalidValueError(
            f"{file}: the list '{name}' has the id {twice!r} twice: take one out"
        )


def _check_inside(name: object, where: str, folder: Path) -> None:
    """Refuse a file name that leads out of the folder, on any system."""
    if not isinstance(name, str) or not _inside(name):
        raise InvalidValueError(
            f"{where} must name a file inside {folder}: write it relative to that folder"
        )


def _inside(name: str) -> bool:
    # Read as Windows does, which knows both kinds of slash and drives.
    path = PureWindowsPath(name)
    return bool(path.parts) and not path.anchor and ".." not in path.parts and "\0" not in name


def _decoded(
    annotation: Mapping[str, Any], height: int, width: int, file: Path, boxes: bool
) -> Bool[np.ndarray, "h w"]:
    """Decode the mask of an annotation; `boxes`: without a segmentation it is the box."""
    segmentation = annotation.get("segmentation")
    where = f"{file}: annotation {annotation['id']} of image {annotation['image_id']}"
    if not segmentation:
        box = annotation.get("bbox") if boxes else None
        box = [_number(side) for side in box] if isinstance(box, list) else box
        if not _is_box(box):
            raise NoMaskError(
                f"{where} has no segmentation{', and no box' if boxes else ', only its box'}: masks "
                "need a file with instance segmentations"
                + ("" if boxes else "; or take boxes (boxes=True, pointing-game --masks box)")
            )
        x, y, w, h = cast("list[float]", box)
        segmentation = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    elif isinstance(segmentation, list) and not any(
        isinstance(p, list | dict) for p in segmentation
    ):
        segmentation = [segmentation]
    remedy = "correct it, or take the annotation out"
    if isinstance(segmentation, list):
        segmentation = _polygons(segmentation)
    try:
        if isinstance(segmentation, list) and any(isinstance(code, dict) for code in segmentation):
            masks = np.stack([_unpacked(code, height, width) for code in segmentation])
            return np.asarray(masks.any(axis=0))
        decode = _filled if isinstance(segmentation, list) else _unpacked
        return decode(segmentation, height, width)
    except NoMaskError as error:
        raise NoMaskError(f"{where} has a broken segmentation: {error}; {remedy}") from error
    except ValueError as error:
        raise InvalidValueError(f"{where} has a broken segmentation: {error}; {remedy}") from error


def _is_box(box: object) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(map(_coordinate, box))


def _reach(mask: Bool[np.ndarray, "h w"], axis: int) -> Bool[np.ndarray, " n"]:
    """Return which rows (axis 1) or columns (axis 0) lie between the first and the last of a mask."""
    shown = np.asarray(mask.any(axis=axis))
    reach: Bool[np.ndarray, " n"] = np.zeros_like(shown)
    if shown.any():
        first, last = np.flatnonzero(shown)[[0, -1]]
        reach[first : last + 1] = True
    return reach


def _coordinate(value: object) -> bool:
    return type(value) in (int, float) and abs(cast("float", value)) < 1e9


def _filled(polygons: list[Any], height: int, width: int) -> Bool[np.ndarray, "h w"]:
    """Fill polygons, after checks that keep pycocotools' C code within bounds."""
    # Beyond, its code of a mask may outgrow the memory that it takes for it.
    if height * width > 1 << 26:
        raise InvalidValueError(f"{width} x {height} pixels are too many for polygons")
    # Points and lines cover nothing, and are left out beside polygons.
    areas = [p for p in polygons if not isinstance(p, list) or len(p) not in (0, 2, 4)]
    polygons = areas or polygons
    length = 0.0
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise NoMaskError("a polygon must list x and y of at least 3 corners")
        odd = [value for value in polygon if type(value) not in (int, float)]
        if odd:
            raise InvalidValueError(f"a polygon has the coordinate {odd[0]!r}")
        reach = 2 * max(height, width)
        # NaN compares as outside.
        if not all(-reach <= value <= 2 * reach for value in polygon):
            raise InvalidValueError(
                f"a polygon leaves the image of {width} x {height} pixels by far"
            )
        corners = np.array(polygon, dtype=np.float64).reshape(-1, 2)
        length += np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1).sum()
    # It takes some 100 bytes for each pixel of the way round.
    if length > 1 << 22:
        raise InvalidValueError(f"its outline is {length:.0f} pixels long")
    tool = importlib.import_module("pycocotools.mask")
    with warnings.catch_warnings():
        # pycocotools has not followed NumPy 2 here.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        code = tool.merge(tool.frPyObjects(polygons, height, width))
        return np.asarray(tool.decode(code), dtype=bool)


def _unpacked(code: Any, height: int, width: int) -> Bool[np.ndarray, "h w"]:
    """Unpack a run-length code, plain or compressed: down the columns, background first."""
    if not isinstance(code, dict) or not {"size", "counts"} <= set(code):
        raise InvalidValueError("a run-length code must have size and counts")
    if code["size"] != [height, width]:
        raise InvalidValueError(
            f"its size is {code['size']}, where the image has {[height, width]}"
        )
    counts = code["counts"]
    if isinstance(counts, list):
        counts = [_whole(run) for run in counts]
        plain = all(type(run) is int and 0 <= run < 1 << 32 for run in counts)
        runs = np.array(counts, dtype=np.int64) if plain else None
    else:
        runs = _runs(counts) if isinstance(counts, str) else None
    if runs is None or (runs < 0).any():
        raise InvalidValueError("its counts are no run lengths")
    if (runs > height * width).any() or runs.sum() != height * width:
        raise InvalidValueError(
            f"its runs cover {runs.sum()} pixels, where the image has {height * width}"
        )
    pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return np.asarray(pixels.reshape(width, height).T)


def _runs(text: str) -> Int64[np.ndarray, " n"] | None:
    """Return the run lengths of COCO's compressed code, None where it is none.

    Six bits a character from "0" on: five of the number, low ones first, and one that says that more
    follow; from the fourth run on, the difference to the run before the last. pycocotools writes past
    the mask where the runs are too long, so they are summed before anything is decoded.
    """
    if not text.isascii():
        return None
    bits = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(bits & 32 == 0)
    if ((bits < 0) | (bits > 63)).any() or not len(ends) or ends[-1] < len(bits) - 1:
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    shifts = 5 * (np.arange(len(bits)) - np.repeat(starts, ends - starts + 1))
    if shifts.max() > 40:
        return None
    runs = np.add.reduceat((bits & 31) << shifts, starts)
    runs[bits[ends] & 16 > 0] -= (32 << shifts[ends])[bits[ends] & 16 > 0]
    for first in (1, 2):
        runs[first::2] = runs[first::2].cumsum()
    return runs
