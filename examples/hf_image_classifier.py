"""An image classifier of Hugging Face transformers, fed with its own arguments.

python examples/hf_image_classifier.py    # needs pip install transformers
"""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from common import Shapes
from jsonargparse import auto_cli
from torch.utils.data import DataLoader
from transformers import ResNetConfig, ResNetForImageClassification

from lightning_aop import ExplanationMonitor


class Processed(Shapes):
    """The images as the arguments of the model."""

    def __getitem__(self, index: int) -> Any:
        return {"pixel_values": self.pictures[index], "labels": self.labels[index]}


class Classifier(pl.LightningModule):
    """A small ResNet; one that is loaded by `from_pretrained` is fine-tuned in the same way."""

    def __init__(self) -> None:
        super().__init__()
        config = ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1])
        config.id2label = dict(enumerate(Shapes.classes))
        self.model = ResNetForImageClassification(config)

    def forward(self, pixel_values: Any, labels: Any = None) -> Any:
        return self.model(pixel_values=pixel_values, labels=labels)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(**batch).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self(**batch).loss, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def main(epochs: int = 8, pictures: int = 1200, output: Path = Path("runs/hf")) -> None:
    """Train a small network on generated images, watched."""
    pl.seed_everything(0)
    monitor = ExplanationMonitor()
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[monitor], default_root_dir=output)
    train, val = Processed(pictures, seed=0), Processed(64, seed=1)
    trainer.fit(Classifier(), DataLoader(train, 32, shuffle=True), DataLoader(val, 64))
    print(f"\nopen {Path(str(trainer.log_dir)) / 'explanations' / 'report.html'}")


if __name__ == "__main__":
    auto_cli(main)
