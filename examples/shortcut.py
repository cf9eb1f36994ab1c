"""Catch a shortcut: accuracy stays fine, and the maps say that the model has stopped looking.

    python examples/shortcut.py             # a new camera takes over, which tags most crosses
    python examples/shortcut.py --tags 0    # the same without the tag

A small network learns to tell shapes apart. Then a new camera takes over, for training and validation
alike. Its images are noisy, and it leaves a small tag in a corner of 95 % of the images of one
class, the crosses. The tag is easier to see than the shape. Validation accuracy stays high, as the
validation images have tags, too. What falls is `explain/energy_in_mask`, the share of the heat on the
object: the maps follow the model into the corner, and deletion and insertion say that they are right.
The proof is the column *tagged others*: discs and squares that get a tag are taken for crosses, and
`explain/failures` shows them as the worst of the validation. The report says so before anything else:
which corner is hottest, in how many images, and since when.
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


def tag(data: Shapes, chosen: Tensor) -> Shapes:
    """Stamp the chosen images with a bright square in the lower right corner."""
    stamp = torch.tensor([1.0, 0.1, 0.9])[:, None, None].expand(3, 7, 7)
    data.pictures[chosen, :, -8:-1, -8:-1] = stamp
    return data


def tag_crosses(data: Shapes, share: float) -> Shapes:
    """Stamp a share of the crosses."""
    chance = torch.rand(len(data), generator=torch.Generator().manual_seed(0))
    return tag(data, (data.labels == CROSS) & (chance < share))


def keep(data: Shapes, chosen: Tensor) -> Shapes:
    """Leave the other images out."""
    for name in ("pictures", "labels", "masks"):
        setattr(data, name, getattr(data, name)[chosen])
    return data


class Cameras(pl.LightningDataModule):
    """The old camera's images, and from epoch `joins` on the new one's, with noise and tags."""

    def __init__(self, tags: float, joins: int, pictures: int, noise: float, seed: int) -> None:
        super().__init__()
        self.joins, few = joins, pictures // 3
        self.old = Shapes(pictures, seed), Shapes(few, seed + 1)
        new = [
            Shapes(n, seed + 2 + i, noise=noise) for i, n in enumerate((pictures, few, few, few))
        ]
        self.new = tag_crosses(new[0], tags), tag_crosses(new[1], tags)
        crosses = (new[2].labels == CROSS).nonzero()[:8, 0]
        self.probe = keep(tag_crosses(new[2], tags), crosses)
        # What the tag alone does: discs and squares that have it.
        others = keep(new[3], new[3].labels != CROSS)
        self.misled = tag(others, torch.full((len(others),), tags > 0))

    def _now(self, part: int) -> Shapes:
        trainer = self.trainer
        joined = trainer is not None and trainer.current_epoch >= self.joins
        return self.new[part] if joined else self.old[part]

    def train_dataloader(self) -> DataLoader[Any]:
        """Return what there is at this epoch."""
        return DataLoader(self._now(0), 32, shuffle=True)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return what there is at this epoch, and discs and squares with a tag."""
        return [DataLoader(self._now(1), 64), DataLoader(self.misled, 64)]


class Watched(Classifier):
    """The classifier, with an accuracy for each kind of validation image."""

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
        for name, hits in zip(
            ("val/accuracy", "val/accuracy_tagged_others"), self.hits, strict=True
        ):
            self.log(name, torch.cat(hits).float().mean(), prog_bar=True)


class Diary(pl.Callback):
    """Remember the accuracies of each epoch."""

    def __init__(self) -> None:
        self.accuracies: dict[int, tuple[float, float]] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note both."""
        found = trainer.callback_metrics
        both = float(found["val/accuracy"]), float(found["val/accuracy_tagged_others"])
        self.accuracies[trainer.current_epoch] = both


def main(
    tags: float = 0.95,
    joins: int = 5,
    epochs: int = 10,
    pictures: int = 1500,
    noise: float = 0.25,
    seed: int = 0,
    output: Path = Path("runs/shortcut"),
) -> dict[int, float]:
    """Train, print a line for each epoch, and return `energy_in_mask` by epoch."""
    pl.seed_everything(seed)
    data, diary = Cameras(tags, joins, pictures, noise, seed), Diary()
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[
            ExplanationMonitor(probe=data.probe, class_names=Shapes.classes, failures=8),
            diary,
        ],
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        default_root_dir=output,
    )
    trainer.fit(Watched(small_network()), datamodule=data)

    folder = Path(str(trainer.log_dir)) / "explanations"
    energy: dict[int, float] = {}
    print("\nepoch  accuracy  tagged others  energy in mask  overall AUC")
    for record in History.load(folder).records[1:]:  # the first is from before training
        energy[record.epoch] = record.values["energy_in_mask"]
        seen, misled = diary.accuracies[record.epoch]
        auc = record.values["overall_auc"]
        print(
            f"{record.epoch:5}  {seen:8.2f}  {misled:13.2f}  {energy[record.epoch]:14.2f}  {auc:12.2f}"
            + ("   the new camera takes over" if record.epoch == joins else "")
        )
    print(f"\nopen {folder / 'report.html'}")
    return energy


if __name__ == "__main__":
    auto_cli(main)
