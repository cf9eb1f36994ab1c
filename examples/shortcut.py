"""Catch a shortcut: accuracy stays fine, and the maps say that the model has stopped looking.

    python examples/shortcut.py             # a new camera joins, which stamps most crosses with a tag
    python examples/shortcut.py --tags 0    # the same without the tag

For the first epochs a small network learns to tell noisy shapes apart. Then the data of a new camera
joins, for training and validation alike. It leaves a small tag in a corner of 95 % of the pictures of
one class, the crosses. The tag is easier than the shape. Validation accuracy rises, as the validation
pictures have tags, too. What falls is `explain/energy_in_mask`, the share of the heat on the object:
the maps follow the model into the corner, while deletion and insertion confirm that they are right.
In the report's slider one sees the epoch at which it happens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from common import Classifier, Shapes, small_network
from jsonargparse import auto_cli
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_aop import ExplanationMonitor
from lightning_aop.history import History

CROSS = Shapes.classes.index("cross")


def tag(data: Shapes, share: float, seed: int = 0) -> Shapes:
    """Stamp a share of the crosses with a bright square in the lower right corner."""
    chance = torch.rand(len(data), generator=torch.Generator().manual_seed(seed))
    chosen = (data.labels == CROSS) & (chance < share)
    stamp = torch.tensor([1.0, 0.1, 0.9])[:, None, None].expand(3, 7, 7)
    data.pictures[chosen, :, -8:-1, -8:-1] = stamp
    return data


def only_crosses(data: Shapes, count: int) -> Shapes:
    """Keep the first crosses."""
    rows = (data.labels == CROSS).nonzero()[:count, 0]
    data.pictures, data.labels, data.masks = (
        of[rows] for of in (data.pictures, data.labels, data.masks)
    )
    return data


class Cameras(pl.LightningDataModule):
    """The old camera's pictures, and from epoch `joins` on the new one's."""

    def __init__(self, tags: float, joins: int, pictures: int, noise: float, seed: int) -> None:
        super().__init__()
        self.joins, few = joins, pictures // 3
        self.old = Shapes(pictures, seed, noise=noise), Shapes(few, seed + 1, noise=noise)
        self.new = tuple(
            tag(Shapes(len(data), seed + 2 + i, noise=noise), tags)
            for i, data in enumerate(self.old)
        )
        self.untagged = Shapes(few, seed + 3, noise=noise)  # the new camera's, as they should be
        self.probe = only_crosses(tag(Shapes(few, seed + 4, noise=noise), tags), 8)

    def _now(self, part: int) -> Shapes:
        trainer = self.trainer
        joined = trainer is not None and trainer.current_epoch >= self.joins
        return self.new[part] if joined else self.old[part]

    def train_dataloader(self) -> DataLoader[Any]:
        """Return what there is at this epoch."""
        return DataLoader(self._now(0), 32, shuffle=True)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return what there is at this epoch, and pictures without a tag."""
        return [DataLoader(self._now(1), 64), DataLoader(self.untagged, 64)]


class Watched(Classifier):
    """The classifier, with an accuracy for each kind of validation pictures."""

    def on_validation_epoch_start(self) -> None:
        """Count from 0."""
        self.hits: tuple[list[Tensor], list[Tensor]] = ([], [])

    def validation_step(
        self, batch: Sequence[Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count the hits."""
        images, labels = batch
        self.hits[dataloader_idx].append(self(images).argmax(dim=1) == labels)

    def on_validation_epoch_end(self) -> None:
        """Log what share of each was right."""
        for name, hits in zip(("val/accuracy", "val/accuracy_untagged"), self.hits, strict=True):
            self.log(name, torch.cat(hits).float().mean(), prog_bar=True)


class Diary(pl.Callback):
    """Remember the accuracies of each epoch."""

    def __init__(self) -> None:
        self.accuracies: dict[int, tuple[float, float]] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note both."""
        found = trainer.callback_metrics
        both = float(found["val/accuracy"]), float(found["val/accuracy_untagged"])
        self.accuracies[trainer.current_epoch] = both


def main(
    tags: float = 0.95,
    joins: int = 5,
    epochs: int = 10,
    pictures: int = 1500,
    noise: float = 0.5,
    seed: int = 0,
    output: Path = Path("runs/shortcut"),
) -> dict[int, float]:
    """Train, print a line for each epoch, and return `energy_in_mask` by epoch."""
    pl.seed_everything(seed)
    data, diary = Cameras(tags, joins, pictures, noise, seed), Diary()
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[ExplanationMonitor(probe=data.probe, class_names=Shapes.classes), diary],
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        default_root_dir=output,
    )
    trainer.fit(Watched(small_network()), datamodule=data)

    folder = Path(str(trainer.log_dir)) / "explanations"
    energy: dict[int, float] = {}
    print("\nepoch  accuracy  without tags  energy in mask  over-all AUC")
    for record in History.load(folder).records[1:]:  # the first is from before training
        energy[record.epoch] = record.values["energy_in_mask"]
        seen, untagged = diary.accuracies[record.epoch]
        auc = record.values["overall_auc"]
        print(
            f"{record.epoch:5}  {seen:8.2f}  {untagged:12.2f}  {energy[record.epoch]:14.2f}  {auc:12.2f}"
            + ("   the new camera joins" if record.epoch == joins else "")
        )
    print(f"\nopen {folder / 'report.html'}")
    return energy


if __name__ == "__main__":
    auto_cli(main)
