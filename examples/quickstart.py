"""One line more in the Trainer, and one sees what the model looks at while it trains.

python examples/quickstart.py
tensorboard --logdir runs/quickstart
"""

from pathlib import Path

import pytorch_lightning as pl
from common import Classifier, loaders, small_network
from jsonargparse import auto_cli
from pytorch_lightning.loggers import TensorBoardLogger

from lightning_aop import ExplanationMonitor


def main(epochs: int = 6, pictures: int = 1200, output: Path = Path("runs/quickstart")) -> None:
    """Train a small network on generated images, watched."""
    pl.seed_everything(0)
    trainer = pl.Trainer(
        max_epochs=epochs,
        logger=TensorBoardLogger(output, name=None),
        callbacks=[ExplanationMonitor()],
        log_every_n_steps=10,
    )
    trainer.fit(Classifier(small_network()), *loaders(pictures))
    print(f"\nopen {Path(str(trainer.log_dir)) / 'explanations' / 'report.html'}")
    for name, value in sorted(trainer.callback_metrics.items()):
        print(f"{name:42} {float(value):.3f}")


if __name__ == "__main__":
    auto_cli(main)
