"""The maps in Weights & Biases: overlays with captions, curves, and a table of all of them at the end.

python examples/wandb_logging.py                     # offline: a folder that `wandb sync` uploads
python examples/wandb_logging.py --offline false     # needs `wandb login`
"""

from pathlib import Path

import pytorch_lightning as pl
from common import Classifier, loaders, small_network
from jsonargparse import auto_cli
from pytorch_lightning.loggers import WandbLogger

from lightning_aop import ExplanationMonitor


def main(
    offline: bool = True,
    epochs: int = 6,
    pictures: int = 1200,
    output: Path = Path("runs/wandb_logging"),
) -> None:
    """Train a small network on generated images, watched."""
    pl.seed_everything(0)
    output.mkdir(parents=True, exist_ok=True)
    logger = WandbLogger(project="lightning_aop", save_dir=output, offline=offline)
    trainer = pl.Trainer(max_epochs=epochs, logger=logger, callbacks=[ExplanationMonitor()])
    trainer.fit(Classifier(small_network()), *loaders(pictures))
    logger.experiment.finish()


if __name__ == "__main__":
    auto_cli(main)
