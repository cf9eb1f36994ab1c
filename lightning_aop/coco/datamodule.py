"""CocoClassification: the data module of any folder in COCO's format."""

import logging
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import v2

from lightning_aop.coco.dataset import CocoMultilabel
from lightning_aop.coco.features import (
    CachedFeatures,
    Precision,
    cached_features,
    default_cache_dir,
)
from lightning_aop.data.images import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from lightning_aop.data.shapes import write_shapes
from lightning_aop.errors import InvalidValueError, MissingFileError

_log = logging.getLogger(__name__)


class CocoClassification(pl.LightningDataModule):
    """Multilabel batches (images [B, 3, H, W], labels [B, K]) from a folder in COCO's format.

    COCO's own layout is `train2017/`, `val2017/` and `annotations/instances_{train,val}2017.json`;
    see `CocoMultilabel.from_root` for others. The classes are the file's categories by their ids.
    Annotation tools often write one file: then `annotations` names it instead of `root`, and every
    fifth image is held out to validate with.

    Over several processes, the sets to evaluate are padded to equal shares with blank images whose
    labels are −1, which nothing counts: every image is judged exactly once.

    Args:
        root: the folder.
        annotations: one JSON file with all images, instead of a root with splits.
        images: the folder of the images of `annotations`; by default the one that the file is in.
        val_share: the share of the images of `annotations` that is held out for validation, test and
            prediction, the same ones in every run; 1 takes all of them for both.
        train: the split to train with.
        val: the split to validate with, and to predict.
        test: the split to test with; by default `val`.
        size: of the square that the model sees, in pixels.
        resize: "squash" the whole image into it, as in the paper, or "crop" its middle.
        mean: what images in [0, 1] are normalised with; by default ImageNet's values.
        std: likewise.
        horizontal_flip: mirror half of the training images, at random.
        batch_size: images in a batch, of each process.
        num_workers: processes that read images.
        pin_memory: speed up the way to a GPU, where there is one.
        persistent_workers: keep the workers from epoch to epoch.
        keep_empty: keep images without annotations, as negative for every class.
        crowds: let crowd annotations count.
        on_error: "raise" at the first image that can't be read, or "skip" such images, and list
            them at the end.
        value_range: the values that are black and white, for greyscale images of more than 8 bits.
        links: read images that are links out of their folder.
        exif: turn images as their EXIF data says, as browsers and most annotation tools do.
        features: "cached" computes what a frozen backbone makes of each image once, and trains the
            head on that; "live" runs the backbone in every epoch.
        cache_dir: where features are kept; by default `~/.cache/lightning_aop/features`.
        cache_precision: "float16" halves the file.
        shapes: to try things out without data, write this many generated training images of
            coloured shapes, and a tenth of it to validate, into `root` first.

    Attributes:
        classes: the names of the classes, once `setup` has run.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        annotations: str | Path | None = None,
        images: str | Path | None = None,
        val_share: float = 0.2,
        train: str = "train2017",
        val: str = "val2017",
        test: str | None = None,
        size: int = 224,
        resize: Literal["squash", "crop"] = "squash",
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        horizontal_flip: bool = False,
        batch_size: int = 32,
        num_workers: int = 4,
        pin_memory: bool = True,
        persistent_workers: bool = True,
        keep_empty: bool = True,
        crowds: bool = True,
        on_error: Literal["raise", "skip"] = "raise",
        value_range: tuple[float, float] | None = None,
        links: bool = False,
        exif: bool = True,
        features: Literal["live", "cached"] = "live",
        cache_dir: str | Path | None = None,
        cache_precision: Precision = "float32",
        shapes: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise InvalidValueError(
                f"batch_size must be at least 1 and num_workers at least 0, got {batch_size} and "
                f"{num_workers}"
            )
        if features == "cached" and horizontal_flip:
            raise InvalidValueError(
                "features='cached' keeps one result for each image, horizontal_flip=True wants "
                "another in every epoch: switch one of them off"
            )
        if (root is None) == (annotations is None) or (images is not None and annotations is None):
            raise InvalidValueError(
                "the data are either a root with splits (--data.root DIR), or one file "
                "(--data.annotations FILE --data.images DIR), got "
                f"root={root}, annotations={annotations}, images={images}"
            )
        if not 0 < val_share <= 1:
            raise InvalidValueError(f"val_share must lie above 0 and not above 1, got {val_share}")
        if annotations is not None and shapes is not None:
            raise InvalidValueError("generated shapes are written into a root: give root")
        self.annotations = None if annotations is None else Path(annotations).expanduser()
        self.images = None if images is None else Path(images).expanduser()
        self.val_share = val_share
        # The folder that messages name, where there is no root.
        self.root = Path(root or self.images or Path(str(annotations)).parent).expanduser()
        self.shapes = shapes
        self.splits = {"train": train, "val": val, "test": test or val}
        self.preprocess = Preprocess(size, resize, mean, std)
        self.horizontal_flip = horizontal_flip
        self.batch_size, self.num_workers = batch_size, num_workers
        self.pin_memory, self.persistent_workers = pin_memory, persistent_workers
        self.options: dict[str, Any] = {
            "keep_empty": keep_empty,
            "crowds": crowds,
            "on_error": on_error,
            "value_range": value_range,
            "links": links,
            "exif": exif,
        }
        self.features = features
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self.cache_precision: Precision = cache_precision
        self.classes: list[str] = []
        self._open: dict[str, CocoMultilabel] = {}

    def prepare_data(self) -> None:
        """Write the generated images, if they are asked for and not there yet."""
        if self.shapes is not None:
            count = max(self.shapes // 10, 1)
            write_shapes(self.root, train=self.shapes, val=count)

    def setup(self, stage: str) -> None:
        """Open the splits that the stage needs."""
        if self.annotations is None and not self.root.is_dir():
            raise MissingFileError(
                f"root {self.root} is no folder: give one in COCO's layout, with train2017/, "
                "val2017/ and annotations/"
            )
        needed = {"fit": ("train", "val"), "test": ("test",)}.get(stage, ("val",))
        for name in needed:
            data = self.dataset(name)
            if not data.classes:
                raise InvalidValueError(
                    f"{data.file} lists no categories: there is nothing to learn"
                )
            if not len(data):
                raise InvalidValueError(f"{data.file} lists no images: give a split that has some")
            if self.classes and data.classes != self.classes:
                raise InvalidValueError(
                    f"{data.file} has the classes {data.classes}, where another split of {self.root} "
                    f"has {self.classes}: the splits must share their categories"
                )
            self.classes = data.classes

    def dataset(self, name: Literal["train", "val", "test"] | str) -> CocoMultilabel:
        """Return the images of a split, opened once."""
        split = self.splits[name]
        key = split if name == "train" else f"{split} evaluated"
        if key not in self._open:
            transform = (
                v2.Compose([self.preprocess, v2.RandomHorizontalFlip()])
                if name == "train" and self.horizontal_flip
                else self.preprocess
            )
            if self.annotations is None:
                self._open[key] = CocoMultilabel.from_root(
                    self.root, split, transform, **self.options
                )
            else:
                whole = CocoMultilabel(self.root, self.annotations, transform, **self.options)
                self._open[key] = whole.part(self._rows(len(whole), name == "train"))
        return self._open[key]

    def _rows(self, count: int, train: bool) -> list[int]:
        """Return the images of a single file to train with, or those to validate with."""
        held = max(1, round(count * self.val_share))
        if held >= count:
            return list(range(count))
        # Evenly spread: a file lists together what was photographed together.
        out = {int((i + 0.5) * count / held) for i in range(held)}
        return [row for row in range(count) if (row in out) != train]

    def train_dataloader(self) -> Any:
        """Return shuffled batches."""
        data = self._inputs("train")
        # Its own generator: the order then depends on the seed alone, not on what else is drawn.
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        generator = torch.Generator().manual_seed((torch.initial_seed() + epoch) % 2**63)
        return self._loader(data, sampler=RandomSampler(data, generator=generator))

    def val_dataloader(self) -> Any:
        """Return the batches to validate with."""
        return self._loader(self._padded(self._inputs("val")))

    def test_dataloader(self) -> Any:
        """Return the batches to test with."""
        return self._loader(self._padded(self._inputs("test")))

    def predict_dataloader(self) -> Any:
        """Return the batches of the split to validate with; Lightning shares them without padding."""
        return self._loader(self._inputs("val"))

    def teardown(self, stage: str) -> None:
        """List what was left out."""
        for data in self._open.values():
            if lines := data.skipped():
                _log.warning(
                    "%d of the %d images of %s were left out:\n%s",
                    len(lines),
                    len(data),
                    data.file,
                    "\n".join(f"  {line}" for line in lines),
                )

    def _loader(self, data: Dataset[Any], **options: Any) -> Any:
        # Features come out of a mapped file, faster than a worker could hand them over.
        pictures = not isinstance(getattr(data, "dataset", data), CachedFeatures)
        workers = self.num_workers if pictures else 0
        return DataLoader(
            data,
            batch_size=self.batch_size,
            num_workers=workers,
            persistent_workers=self.persistent_workers and workers > 0,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            **options,
        )

    def _inputs(self, name: str) -> "CocoMultilabel | CachedFeatures":
        """Return the images of a split, or their features."""
        data = self.dataset(name)
        if self.features == "live":
            return data
        trainer = self.trainer
        model = None if trainer is None else trainer.lightning_module
        backbone = getattr(model, "backbone", None)
        if trainer is None or model is None or not isinstance(backbone, nn.Module):
            raise InvalidValueError(
                "features='cached' needs a model with a `backbone` that gives features [B, D], such "
                "as MultilabelClassifier, in a Trainer"
            )
        if any(p.requires_grad for p in backbone.parameters()):
            raise InvalidValueError(
                "features='cached' needs a frozen backbone, whose features stay the same: set "
                "train_backbone to false, or features to live"
            )
        return cached_features(
            backbone,
            data,
            self.cache_dir,
            precision=self.cache_precision,
            device=model.device,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            barrier=trainer.strategy.barrier,
        )

    def _padded(self, data: "CocoMultilabel | CachedFeatures") -> "Dataset[Any]":
        world_size = 1 if self.trainer is None else self.trainer.world_size
        return data if len(data) % world_size == 0 else Padded(data, world_size)


class Padded(Dataset[tuple[Tensor, Tensor]]):
    """A data set made as long as a multiple of `multiple`, with blank images that don't count."""

    def __init__(self, dataset: "CocoMultilabel | CachedFeatures", multiple: int) -> None:
        self.dataset = dataset
        self.classes = dataset.classes
        self.length = -(-len(dataset) // multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index < len(self.dataset):
            return self.dataset[index]
        image, label = self.dataset[0]
        return torch.zeros_like(image), torch.full_like(label, -1.0)
