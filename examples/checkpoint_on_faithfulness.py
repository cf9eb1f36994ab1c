"""Keep the checkpoint whose explanations are the most faithful, beside the one that scores best.

    python examples/checkpoint_on_faithfulness.py

The overall AUC rises with the scores themselves, so it is no judge between models: of two checkpoints
of one run with the same accuracy it says which one relies more on what its maps show.
"""

from pathlib import Path

import pytorch_lightning as pl
from common import Classifier, loaders, small_network
from jsonargparse import auto_cli
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_aop import ExplanationMonitor


def main(epochs: int = 6, pictures: int = 1200, output: Path = Path("runs/checkpoints")) -> None:
    """Train, and print which epochs were kept."""
    pl.seed_everything(0)
    accurate = ModelCheckpoint(monitor="val/accuracy", mode="max", filename="accurate-{epoch}")
    faithful = ModelCheckpoint(
        monitor="explain/overall_auc", mode="max", filename="faithful-{epoch}"
    )
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[ExplanationMonitor(), accurate, faithful],
        default_root_dir=output,
    )
    trainer.fit(Classifier(small_network()), *loaders(pictures))
    for kept in (accurate, faithful):
        score = float(kept.best_model_score) if kept.best_model_score is not None else float("nan")
        print(f"{kept.monitor:22} {score:.3f}  {kept.best_model_path}")


if __name__ == "__main__":
    auto_cli(main)
