"""A new head on a backbone for data in COCO's format, watched: several classes per image, with masks.

    python examples/multilabel_coco.py                                  # generated images, no weights
    python examples/multilabel_coco.py --data COCO_DIR --backbone resnet50 --weights DEFAULT --size 224

COCO_DIR holds train2017/, val2017/ and annotations/instances_{train,val}2017.json. The same from the
shell, with more settings: lightning-aop fit --config coco_resnet50 --data.root COCO_DIR
"""

from pathlib import Path

import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli

from lightning_aop import ExplanationMonitor
from lightning_aop.coco import CocoClassification, MultilabelClassifier


def main(
    data: Path | None = None,
    backbone: str = "resnet18",
    weights: str | None = None,
    size: int = 96,
    epochs: int = 3,
    pictures: int = 300,
    output: Path = Path("runs/multilabel_coco"),
) -> None:
    """Train the head of a backbone with weights, or all of one without."""
    pl.seed_everything(0)
    module = CocoClassification(
        data or output / "shapes",
        shapes=None if data else pictures,
        size=size,
        batch_size=16,
        num_workers=0,
        persistent_workers=False,
    )
    model = MultilabelClassifier(
        backbone,
        weights,
        train_backbone=weights is None,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    )
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[ExplanationMonitor(panels=["overlay", "map"])],
        default_root_dir=output,
        log_every_n_steps=5,
    )
    trainer.fit(model, datamodule=module)
    print(f"\nopen {Path(str(trainer.log_dir)) / 'explanations' / 'report.html'}")


if __name__ == "__main__":
    auto_cli(main)
