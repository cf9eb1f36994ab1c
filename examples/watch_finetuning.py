"""Fine-tune the head of a torchvision network on a COCO-format folder, and watch where it looks.

    python examples/watch_finetuning.py --data COCO_DIR --backbone mobilenet_v2 --weights FILE
    tensorboard --logdir watch_run

COCO_DIR holds train2017/, val2017/ and annotations/instances_{train,val}2017.json. The same from the
shell, with more settings: lightning-aop fit --config coco_resnet50 --data.root COCO_DIR
"""

import argparse
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from lightning_aop import ExplanationMonitor
from lightning_aop.coco import CocoClassification, MultilabelClassifier


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="a folder in COCO's layout")
    add("--backbone", default="resnet50", help="a torchvision classifier by name")
    add("--weights", default="DEFAULT", help="its state_dict; default: the published weights")
    add("--mean", nargs=3, type=float, default=[0.485, 0.456, 0.406])
    add("--std", nargs=3, type=float, default=[0.229, 0.224, 0.225])
    add("--epochs", type=int, default=2)
    add("--learning-rate", type=float, default=3e-3)
    add("--output", type=Path, default=Path("watch_run"))
    return parser.parse_args()


def main() -> None:
    """Fine-tune and watch."""
    o = options()
    pl.seed_everything(0)
    data = CocoClassification(
        o.data, mean=tuple(o.mean), std=tuple(o.std), batch_size=8, num_workers=2
    )
    model = MultilabelClassifier(
        o.backbone, o.weights, optimizer=lambda p: torch.optim.Adam(p, lr=o.learning_rate)
    )
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training")  # it is meant
    trainer = pl.Trainer(
        max_epochs=o.epochs,
        # TensorBoard holds the pictures; beside the CSV file they are written as PNG.
        logger=[TensorBoardLogger(o.output, name="tensorboard"), CSVLogger(o.output, name="csv")],
        callbacks=[ExplanationMonitor()],
        log_every_n_steps=5,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, datamodule=data)


if __name__ == "__main__":
    main()
