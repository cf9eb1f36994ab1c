"""The demo: a small network learns to find shapes, and an ExplanationMonitor shows it happen.

Everything it needs is generated, so it runs offline, in about a minute on two CPU cores.
"""

import csv
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from jaxtyping import Bool, Float
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MultilabelAveragePrecision

from lightning_aop import ExplanationMonitor
from lightning_aop.coco import CocoMultilabel
from lightning_aop.metrics import Faithfulness
from lightning_aop.probing import isolated_rng
from lightning_aop.scores import sigmoid
from lightning_aop.shapes import CLASSES, write_shapes
from lightning_aop.types import Images, Maps, Targets

PROBE = 8
"""How many validation pictures are explained."""


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution with what belongs to it."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class ShapeClassifier(pl.LightningModule):
    """Say for each class whether one of its shapes is in the picture."""

    def __init__(self, classes: int, learning_rate: float = 2e-3) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.features = nn.Sequential(
            block(3, 24, stride=2),
            block(24, 48, stride=2),
            block(48, 96, stride=2),
            block(96, 128),
            block(128, 128),
        )
        self.head = nn.Linear(128, classes)
        self.loss = nn.BCEWithLogitsLoss()
        self.mean_ap = MultilabelAveragePrecision(classes)

    def forward(self, images: Images) -> Float[Tensor, "b k"]:
        """Return a logit for each class."""
        features = self.features(images)
        return cast("Tensor", self.head(features.amax(dim=(2, 3)) + features.mean(dim=(2, 3))))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        loss = cast("Tensor", self.loss(self(images), labels))
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Judge a batch."""
        images, labels = batch
        logits = self(images)
        self.mean_ap(logits, labels.int())
        self.log("val/loss", self.loss(logits, labels))
        self.log("val/mAP", self.mean_ap, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """Return AdamW under a one-cycle schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class ShapeFaithfulness(Faithfulness):
    """The monitor's own metric, and as the masks are known here, the heat that lies in them.

    Args:
        masks: where the explained shape is, for each explanation.
    """

    heat: Tensor

    def __init__(self, masks: Bool[Tensor, "p h w"]) -> None:
        super().__init__(sigmoid, steps=28)
        self.masks = masks
        self.add_state("heat", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, model: nn.Module, images: Images, maps: Maps, targets: Targets) -> None:
        """Judge one map for each mask."""
        super().update(model, images, maps, targets)
        inside = torch.where(self.masks, maps, 0.0).sum(dim=(1, 2))
        self.heat += (inside / maps.sum(dim=(1, 2)).clamp(min=1e-12)).sum()

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Return the means, with the heat on the object and the share it has of the area."""
        return super().compute() | {
            "heat_on_object": self.heat / self.total,
            "object_area": self.masks.float().mean(),
        }


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured, and where it wrote.

    Attributes:
        before: the measurements of the untrained network, by name.
        after: those of the trained one.
        logs: the folder of this run, for TensorBoard.
        grids: the folder of the heatmaps, one PNG a step.
    """

    before: dict[str, float]
    after: dict[str, float]
    logs: Path
    grids: Path


MEASURES = {
    "val/mAP": "validation mAP",
    "explain/deletion_auc": "deletion AUC (lower is better)",
    "explain/insertion_auc": "insertion AUC (higher is better)",
    "explain/overall_auc": "over-all AUC (higher is better)",
    "explain/heat_on_object": "heat on the object",
    "explain/object_area": "area of the object (a map that knows nothing)",
}


def run(
    root: Path = Path("demo_run"), epochs: int = 7, seed: int = 0, pictures: int = 1200
) -> DemoResult:
    """Train with an ExplanationMonitor, print what it saw before and after, and where to look.

    Args:
        root: where to write: the pictures once, the logs of each run in a folder of their own.
        epochs: how long to train.
        seed: of the network and the order of the pictures.
        pictures: how many to train with.
    """
    write_shapes(root / "shapes", train=pictures, progress=True)
    train, val = (CocoMultilabel.from_root(root / "shapes", split) for split in ("train", "val"))
    csv_logger = CSVLogger(root, name="logs")
    tensorboard = TensorBoardLogger(
        root, name="logs", version=csv_logger.version, default_hp_metric=False
    )
    # One explanation for each class in a picture, in the order of the labels.
    masks = [torch.from_numpy(val.masks(index))[val.labels[index]] for index in range(PROBE)]
    monitor = ExplanationMonitor(
        probe=PROBE, metrics=ShapeFaithfulness(torch.cat(masks)), class_names=CLASSES
    )
    with _quiet(), isolated_rng(seed=seed):
        model = ShapeClassifier(len(CLASSES))
        batches = DataLoader(_decoded(train), batch_size=16, shuffle=True)
        val_batches = DataLoader(_decoded(val), batch_size=60)
        settings: dict[str, Any] = {
            "accelerator": "cpu",
            "enable_model_summary": False,
            "enable_checkpointing": False,
        }
        untrained = pl.Trainer(logger=False, enable_progress_bar=False, **settings)
        before = untrained.validate(model, val_batches, verbose=False)[0]
        trainer = pl.Trainer(
            max_epochs=epochs,
            logger=[csv_logger, tensorboard],
            callbacks=[monitor],
            log_every_n_steps=5,
            num_sanity_val_steps=0,
            **settings,
        )
        trainer.fit(model, batches, val_batches)
    with (Path(csv_logger.log_dir) / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["explain/overall_auc"]]
    first, last = {**rows[0], **before}, rows[-1]
    result = DemoResult(
        before={name: float(first[name]) for name in MEASURES},
        after={name: float(last[name]) for name in MEASURES},
        logs=Path(csv_logger.log_dir),
        grids=Path(csv_logger.log_dir) / "images" / "explain" / "heatmaps",
    )
    _report(result)
    return result


def _decoded(data: CocoMultilabel) -> TensorDataset:
    """Read every picture once: reading them again in every epoch takes longer than learning."""
    return TensorDataset(
        torch.stack([data[index][0] for index in range(len(data))]), data.labels.float()
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what Lightning says about settings that are meant, and take one thread.

    A network this small gains little from a second one, and loses much where the machine is busy.
    """
    logger, threads = logging.getLogger("pytorch_lightning"), torch.get_num_threads()
    level = logger.level
    try:
        with warnings.catch_warnings():
            for message in (
                ".*does not have many workers",
                ".*LeafSpec",
                ".*available but not used",
            ):
                warnings.filterwarnings("ignore", message)
            logger.setLevel(logging.WARNING)
            torch.set_num_threads(1)
            yield
    finally:
        torch.set_num_threads(threads)
        logger.setLevel(level)


def _report(result: DemoResult) -> None:
    width = max(map(len, MEASURES.values()))
    print(f"\n{'':{width}}  before   after")
    for name, title in MEASURES.items():
        print(f"{title:{width}}  {result.before[name]:6.3f}  {result.after[name]:6.3f}")
    tool = Path(sys.executable).with_name("tensorboard")
    command = tool if tool.exists() else "tensorboard"
    print(f"\nheatmaps     {result.grids}")
    print(f"TensorBoard  {command} --logdir {result.logs.parent}")
