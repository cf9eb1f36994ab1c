"""A vision transformer: the monitor finds the last layer whose patches the classifier still hears.

    python examples/vision_transformer.py

Tokens are turned into feature maps by the image's proportions, class and register tokens left out. A
network whose tokens are not recognised needs GradCAM("blocks.11.norm1", reshape=…).
"""

from pathlib import Path

import pytorch_lightning as pl
from common import Classifier, loaders
from jsonargparse import auto_cli
from torchvision.models import VisionTransformer

from lightning_aop import ExplanationMonitor


def main(
    epochs: int = 6, pictures: int = 1200, output: Path = Path("runs/vision_transformer")
) -> None:
    """Train a small transformer on generated images, watched."""
    pl.seed_everything(0)
    network = VisionTransformer(
        image_size=64,
        patch_size=8,
        num_layers=3,
        num_heads=4,
        hidden_dim=64,
        mlp_dim=128,
        num_classes=3,
    )
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=[ExplanationMonitor(probe=4)], default_root_dir=output
    )
    trainer.fit(Classifier(network, learning_rate=1e-3), *loaders(pictures))
    print(f"\nopen {Path(str(trainer.log_dir)) / 'explanations' / 'report.html'}")


if __name__ == "__main__":
    auto_cli(main)
