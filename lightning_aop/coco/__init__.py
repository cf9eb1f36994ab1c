"""Multilabel training on data in COCO's format: `pip install "lightning-aop[coco]"`."""

from lightning_aop.coco.classifier import MultilabelClassifier
from lightning_aop.coco.datamodule import CocoClassification
from lightning_aop.coco.dataset import CocoMultilabel
from lightning_aop.data.images import ImageError, Preprocess

__all__ = [
    "CocoClassification",
    "CocoMultilabel",
    "ImageError",
    "MultilabelClassifier",
    "Preprocess",
]
