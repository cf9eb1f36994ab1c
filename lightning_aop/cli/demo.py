"""`lightning-aop demo`: a small network learns to find shapes, and ExplanationMonitor shows how.

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
from jaxtyping import Float
from jsonargparse import Namespace
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MultilabelAveragePrecision

from lightning_aop.cli.store import make_folder
from lightning_aop.coco import CocoMultilabel
from lightning_aop.coco.dataset import index_class
from lightning_aop.data.shapes import CLASSES, write_shapes
from lightning_aop.model.isolation import isolated_rng
from lightning_aop.monitor import ExplanationMonitor
from lightning_aop.types import Images

PROBE = 8
"""How many validation images are explained."""


def main(options: Namespace) -> int:
    """Run the command."""
    run(options.root)
    return 0


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution with what belongs to it."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class ShapeClassifier(pl.LightningModule):
    """Say for each class whether one of its shapes is in the image."""

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


class Shapes(Dataset[tuple[Tensor, Tensor]]):
    """The images of a data set, read once: reading them in every epoch takes longer than learning."""

    def __init__(self, data: CocoMultilabel) -> None:
        self.samples = [data[index] for index in range(len(data))]
        self.classes = data.classes
        self.input_masks = data.input_masks

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.samples[index]


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured, and where it wrote.

    Attributes:
        object_area: the share of a probe image that an object covers: the share of the heat that a map
            which does not depend on the model has on it.
        before: the measurements of the untrained network, by name.
        after: those of the trained one.
        logs: the folder of this run, for TensorBoard.
        grids: the folder of the heatmaps, one PNG a step.
    """

    object_area: float
    before: dict[str, float]
    after: dict[str, float]
    logs: Path
    grids: Path


MEASURES = {
    "val/mAP": "validation mAP",
    "explain/deletion_auc": "deletion AUC (lower is better)",
    "explain/insertion_auc": "insertion AUC (higher is better)",
    "explain/overall_auc": "overall AUC (higher is better)",
    "explain/energy_in_mask": "share of the heat on the object",
    "explain/pointing_game": "hottest pixel on the object",
}


def run(
    root: Path = Path("demo_run"), epochs: int = 7, seed: int = 0, pictures: int = 1200
) -> DemoResult:
    """Train with an ExplanationMonitor, print what it saw before and after, and where to look.

    Args:
        root: where to write: the images once, the logs of each run in a folder of their own.
        epochs: how long to train.
        seed: of the network and the order of the images.
        pictures: how many to train with.

    Raises:
        ImportError: pycocotools is not installed.
    """
    index_class()  # before a thousand images are drawn in vain
    make_folder(root, "--root")
    write_shapes(root / "shapes", train=pictures)
    train, val = (
        CocoMultilabel.from_root(root / "shapes", split) for split in ("train2017", "val2017")
    )
    csv_logger = CSVLogger(root, name="logs")
    tensorboard = TensorBoardLogger(
        root, name="logs", version=csv_logger.version, default_hp_metric=False
    )
    monitor = ExplanationMonitor(probe=PROBE)
    with _quiet(), isolated_rng(seed=seed):
        model = ShapeClassifier(len(CLASSES))
        batches = DataLoader(Shapes(train), batch_size=16, shuffle=True)
        val_batches = DataLoader(Shapes(val), batch_size=60)
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
    masks = torch.cat(
        [val.input_masks(i, val.labels[i].nonzero()[:, 0].tolist()) for i in range(PROBE)]
    )
    result = DemoResult(
        object_area=float(masks.float().mean()),
        before={name: float(first[name]) for name in MEASURES},
        after={name: float(last[name]) for name in MEASURES},
        logs=Path(csv_logger.log_dir),
        grids=Path(csv_logger.log_dir) / "images" / "explain" / "heatmaps",
    )
    _report(result)
    return result


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
    print(f"(an object covers {result.object_area:.3f} of its image)")
    tool = Path(sys.executable).with_name("tensorboard")
    command = tool if tool.exists() else "tensorboard"
    print(f"\nreport       {result.logs / 'explanations' / 'report.html'}")
    print(f"heatmaps     {result.grids}")
    print(f"TensorBoard  {command} --logdir {result.logs.parent}")
