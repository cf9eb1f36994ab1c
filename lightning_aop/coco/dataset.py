"""Pictures and instance masks in COCO's format, read for multilabel training with pycocotools."""

import contextlib
import importlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

Transform: TypeAlias = Callable[[Image.Image], Tensor]

_LISTS = ("images", "annotations", "categories")


class CocoMultilabel(Dataset[tuple[Tensor, Tensor]]):
    """COCO-format photos as (image, multi-hot label) pairs, with the masks of each class.

    An image has a class if one of its annotations does, crowds included; an image without
    annotations is negative for every class.

    Args:
        images: the folder of the pictures.
        annotations: the JSON file of the instances.
        transform: turns the RGB picture into the tensor that the model takes; by default it becomes
            a float tensor in [0, 1] at the picture's own size.

    Attributes:
        classes: the names of the classes, by the order of their category ids.
        labels: [N, K], which image has which class.

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
    ) -> None:
        self.folder, self.file = Path(images), Path(annotations)
        self.transform: Transform = transform or _tensor
        self._coco = _read(self.folder, self.file)
        categories = sorted(self._coco.cats)
        self.classes: list[str] = [str(self._coco.cats[c].get("name", c)) for c in categories]
        self._column = {category: column for column, category in enumerate(categories)}
        self._ids: list[Any] = sorted(self._coco.imgs)
        self.labels: Bool[Tensor, "n k"] = torch.zeros(
            len(self._ids), len(categories), dtype=torch.bool
        )
        row = {image: index for index, image in enumerate(self._ids)}
        for annotation in self._coco.dataset["annotations"]:
            self.labels[row[annotation["image_id"]], self._column[annotation["category_id"]]] = True

    @classmethod
    def from_root(
        cls, root: str | Path, split: str = "train", transform: Transform | None = None
    ) -> "CocoMultilabel":
        """Open COCO 2017's own layout: `train2017/` and `annotations/instances_train2017.json`."""
        root = Path(root)
        file = root / "annotations" / f"instances_{split}2017.json"
        return cls(root / f"{split}2017", file, transform)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Float[Tensor, " k"]]:
        return self.transform(self.picture(index)), self.labels[index].float()

    def picture(self, index: int) -> Image.Image:
        """Return the picture as it is on disk, in RGB: the geometry that the masks fit."""
        record = self._coco.imgs[self._ids[index]]
        path = self.folder / record["file_name"]
        try:
            with Image.open(path) as opened:
                picture: Image.Image = opened.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise OSError(
                f"{path}, image {record['id']} of {self.file}, can't be read ({error}): restore the "
                "picture, or take the image out of the annotations"
            ) from error
        return picture

    def masks(self, index: int) -> Bool[np.ndarray, "k h w"]:
        """Return where each class is: the union of its instances, at the picture's own size."""
        record = self._coco.imgs[self._ids[index]]
        masks = np.zeros((len(self.classes), record["height"], record["width"]), dtype=bool)
        for annotation in self._coco.imgToAnns.get(record["id"], []):
            if not annotation.get("segmentation"):
                raise ValueError(
                    f"{self.file}: annotation {annotation['id']} of image {record['id']} has no "
                    "segmentation, only its box: masks need a file with instance segmentations"
                )
            with warnings.catch_warnings():
                # pycocotools has not followed NumPy 2 here.
                warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
                mask = self._coco.annToMask(annotation)
            masks[self._column[annotation["category_id"]]] |= mask.astype(bool)
        return masks


def _tensor(picture: Image.Image) -> Float[Tensor, "3 h w"]:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def _read(folder: Path, file: Path) -> Any:
    """Return pycocotools' index of the file, with all that it refers to checked."""
    try:
        coco_class = importlib.import_module("pycocotools.coco").COCO
    except ImportError as error:
        raise ImportError(
            'CocoMultilabel reads annotations with pycocotools: pip install "lightning-aop[coco]"'
        ) from error
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder: give the one that holds the pictures, such as train2017"
        )
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is no file: give the annotations, such as instances_train2017.json"
        )
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = coco_class(str(file))
    except ValueError as error:
        raise ValueError(
            f"{file} is no valid JSON ({error}): it may be cut short, copy or export it again"
        ) from error
    except (AssertionError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is no COCO instances file ({type(error).__name__}: {error}): its lists "
            f"{', '.join(_LISTS)} must hold objects with their ids"
        ) from error
    for name in _LISTS:
        if not isinstance(coco.dataset.get(name), list):
            raise ValueError(
                f"{file} has no list '{name}': give an instances file, such as "
                "instances_train2017.json"
            )
    for image in coco.imgs.values():
        # Read as Windows does, which knows both kinds of slash and drives.
        path = PureWindowsPath(str(image.get("file_name", "")))
        if path.anchor or ".." in path.parts or not path.parts:
            raise ValueError(
                f"{file}: image {image['id']} has file_name {image.get('file_name')!r}, which must "
                f"name a file inside {folder}: write it relative to that folder"
            )
    for annotation in coco.dataset["annotations"]:
        for key, known in (("category_id", coco.cats), ("image_id", coco.imgs)):
            if annotation.get(key) not in known:
                raise ValueError(
                    f"{file}: annotation {annotation.get('id')} has {key} {annotation.get(key)}, "
                    f"which the file does not list: add it, or take the annotation out"
                )
    return coco
