"""Fine-tune the head of a torchvision network on a COCO-format folder, and watch where it looks.

    python examples/watch_finetuning.py --data COCO_DIR --backbone mobilenet_v2 --weights FILE
    tensorboard --logdir watch_run

COCO_DIR holds train2017/, val2017/ and annotations/instances_{train,val}2017.json.
"""

import argparse
import warnings
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
import torchvision
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MultilabelAveragePrecision
from torchvision.transforms import v2

from lightning_aop import ExplanationMonitor
from lightning_aop.coco import CocoMultilabel


def replace_head(network: nn.Module, classes: int) -> nn.Module:
    """Put a new last layer, linear or 1 × 1 convolution, in the place of the old; return the new."""
    modules = list(network.named_modules())
    last = max(i for i, (_, m) in enumerate(modules) if isinstance(m, (nn.Linear, nn.Conv2d)))
    name, old = modules[last]
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, classes)
    else:
        new = nn.Conv2d(cast("nn.Conv2d", old).in_channels, classes, kernel_size=1)
    network.set_submodule(name, new)
    for name, later in modules[last + 1 :]:
        if isinstance(later, nn.ReLU):
            # SqueezeNet cuts its logits off at 0: no class would ever fall below a score of 0.5.
            network.set_submodule(name, nn.Identity())
    return new


class HeadFinetuning(pl.LightningModule):
    """A frozen backbone, its BatchNorm in eval mode, under a multilabel head that learns."""

    def __init__(self, network: nn.Module, classes: int, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.network = network.requires_grad_(False)
        self.head = replace_head(network, classes)
        self.loss = nn.BCEWithLogitsLoss()
        # A class that no validation picture shows has no average precision, and does not count.
        self.mean_ap = MultilabelAveragePrecision(classes, average="weighted")
        self.train()  # Lightning starts from the modes that it finds, and does not set them.

    def train(self, mode: bool = True) -> "HeadFinetuning":
        """Switch the head alone."""
        super().train(mode)
        self.network.eval()
        self.head.train(mode)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return a logit for each class."""
        return cast("Tensor", self.network(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        loss = cast("Tensor", self.loss(self(batch[0]), batch[1]))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Judge a batch."""
        logits = self(batch[0])
        self.mean_ap(logits, batch[1].int())
        self.log("val/loss", self.loss(logits, batch[1]))
        self.log("val/mAP", self.mean_ap, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam for the head."""
        return torch.optim.Adam(self.head.parameters(), lr=self.learning_rate)


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="a folder in COCO's layout")
    add("--backbone", default="resnet50", help="a torchvision classifier by name")
    add("--weights", type=Path, help="its state_dict; default: torchvision's published weights")
    add("--mean", nargs=3, type=float, default=[0.485, 0.456, 0.406])
    add("--std", nargs=3, type=float, default=[0.229, 0.224, 0.225])
    add("--epochs", type=int, default=2)
    add("--learning-rate", type=float, default=3e-3)
    add("--output", type=Path, default=Path("watch_run"))
    return parser.parse_args()


def main() -> None:
    """Fine-tune and watch."""
    o = options()
    network = torchvision.models.get_model(o.backbone, weights=None if o.weights else "DEFAULT")
    if o.weights:
        network.load_state_dict(torch.load(o.weights, map_location="cpu", weights_only=True))
    transform: Any = v2.Compose(
        [
            v2.ToImage(),
            v2.Resize((224, 224)),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(o.mean, o.std),
            v2.ToPureTensor(),
        ]
    )
    train, val = (CocoMultilabel.from_root(o.data, s, transform) for s in ("train2017", "val2017"))
    warnings.filterwarnings("ignore", "No positive samples found in target")  # in one batch
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training")  # it is meant
    pl.seed_everything(0)
    trainer = pl.Trainer(
        max_epochs=o.epochs,
        # TensorBoard holds the pictures; beside the CSV file they are written as PNG.
        logger=[TensorBoardLogger(o.output, name="tensorboard"), CSVLogger(o.output, name="csv")],
        callbacks=[ExplanationMonitor(mean=o.mean, std=o.std)],
        log_every_n_steps=5,
        num_sanity_val_steps=0,
    )
    trainer.fit(
        HeadFinetuning(network, len(train.classes), o.learning_rate),
        DataLoader(train, batch_size=8, shuffle=True, num_workers=2, persistent_workers=True),
        DataLoader(val, batch_size=16, num_workers=2, persistent_workers=True),
    )


if __name__ == "__main__":
    main()
