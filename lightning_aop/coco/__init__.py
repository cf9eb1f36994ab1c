"""Data in COCO's format, for multilabel training: `pip install "lightning-aop[coco]"`."""

from lightning_aop.coco.dataset import CocoMultilabel

__all__ = ["CocoMultilabel"]
