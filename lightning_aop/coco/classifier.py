"""MultilabelClassifier: a published backbone under a new head, trained with BCEWithLogitsLoss."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

import pytorch_lightning as pl
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    MultilabelAveragePrecision,
    MultilabelF1Score,
    MultilabelPrecision,
    MultilabelRecall,
    MultilabelStatScores,
)

from lightning_aop.data.images import Preprocess
from lightning_aop.data.networks import load_backbone
from lightning_aop.errors import InvalidValueError

OptimizerCallable: TypeAlias = Callable[[Iterable[Any]], Optimizer]
LRSchedulerCallable: TypeAlias = Callable[[Optimizer], LRScheduler]


class Report(nn.Module):
    """What is said of a whole set: mAP, and precision, recall and F1 at a score of 0.5."""

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__()
        self.classes = list(classes)
        # torchmetrics wants two labels at least: a single class is counted twice, and shown once.
        count = max(len(classes), 2)
        self.loss = MeanMetric()
        self.average_precision = MultilabelAveragePrecision(count, average=None, ignore_index=-1)
        kinds = {
            "precision": MultilabelPrecision,
            "recall": MultilabelRecall,
            "F1": MultilabelF1Score,
        }
        metrics: dict[str, Metric | MetricCollection] = {
            f"{name}_{average}": kind(num_labels=count, average=average)
            for name, kind in kinds.items()
            for average in ("micro", "macro")
        }
        metrics["F1_per_class"] = MultilabelF1Score(count, average=None)
        metrics["counts"] = MultilabelStatScores(count, average=None)
        self.at_half = MetricCollection(metrics)

    def update(
        self,
        loss: Float[Tensor, ""],
        images: Float[Tensor, ""],
        logits: Float[Tensor, "b k"],
        labels: Float[Tensor, "b k"],
    ) -> None:
        """Add a batch with its mean loss and the number of its images that count."""
        self.loss.update(loss, images)
        scores, truth, counts = logits.float().sigmoid(), labels.int(), labels[:, 0] >= 0
        if len(self.classes) == 1:
            scores, truth = scores.expand(-1, 2), truth.expand(-1, 2)
        # With what doesn't count: processes can't gather a list that one of them has left empty.
        self.average_precision.update(scores, truth)
        if counts.any():
            self.at_half.update(scores[counts], truth[counts])

    def compute(self, per_class: bool = False) -> dict[str, Float[Tensor, ""]]:
        """Return the values by name, of all processes together."""
        with warnings.catch_warnings():
            # Where no image of this process counts; another one's may.
            warnings.filterwarnings("ignore", ".*was called before the ``update`` method")
            # Classes that no image shows have no average precision, and are left out below.
            warnings.filterwarnings("ignore", "No positive samples found in target")
            results: dict[str, Tensor] = self.at_half.compute()
            counts = results.pop("counts").view(-1, 5)[: len(self.classes)]
            if not counts.any():
                return {"loss": self.loss.compute()}
            precisions = self.average_precision.compute().view(-1)[: len(self.classes)]
        shown = counts[:, -1] > 0
        f1 = results.pop("F1_per_class").view(-1)
        values = {"loss": self.loss.compute(), "mAP": precisions[shown].mean()} | results
        if per_class:
            for k in shown.nonzero()[:, 0].tolist():
                values[f"AP/{self.classes[k]}"] = precisions[k]
                values[f"F1/{self.classes[k]}"] = f1[k]
        return values

    def reset(self) -> None:
        """Forget all batches."""
        # States made in the inference mode of validate() could not be added to in that of fit().
        with torch.inference_mode(False):
            for metric in (self.loss, self.average_precision, self.at_half):
                metric.reset()


class MultilabelClassifier(pl.LightningModule):
    """One logit for each class from any of torchvision's or timm's networks (paper, experiments).

    Batches are (images [B, 3, H, W], labels [B, K]), or (features [B, D], labels) where the data
    module has run the frozen backbone once. Labels are 0 or 1; a row of −1 does not count. Logged:
    `train/loss`, and for `val/` and `test/` the loss, `mAP`, and precision, recall and F1 at a score
    of 0.5, micro and macro. mAP is the mean over the classes that at least one image shows; the macro
    means run over all classes, one that is never predicted counts 0.

    Args:
        backbone: a torchvision classifier by name, or `timm/NAME`.
        weights: a local file with the state_dict of the published network, the name of weights to
            download (`DEFAULT`), or None for random ones.
        num_classes: of the head; by default the classes of the data module.
        train_backbone: train all layers. By default the head alone learns, and the backbone stays in
            eval mode, so that its BatchNorm statistics and dropout don't stir.
        optimizer: makes the optimizer of the parameters that learn.
        lr_scheduler: makes a schedule, stepped after each epoch.
        per_class: log the average precision and the F1 of every class too.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        weights: str | None = "DEFAULT",
        num_classes: int | None = None,
        train_backbone: bool = False,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
        per_class: bool = False,
    ) -> None:
        super().__init__()
        if num_classes is not None and num_classes < 1:
            raise InvalidValueError(f"num_classes must be at least 1, got {num_classes}")
        # What is needed to make the network again, in plain values that load with weights_only. The
        # weights are in the checkpoint, and how it was trained is no matter of the network.
        self.save_hyperparameters(
            {"backbone": backbone, "weights": None, "num_classes": num_classes}
        )
        self.backbone, self.num_features = load_backbone(backbone, weights)
        self.train_backbone = train_backbone
        self.backbone.requires_grad_(train_backbone)
        self.optimizer, self.lr_scheduler, self.per_class = optimizer, lr_scheduler, per_class
        self.classes: list[str] = []
        self.head: nn.Linear | None = None
        if num_classes is not None:
            self._make_head([f"class {i}" for i in range(num_classes)])
        self.train()  # Lightning starts from the modes that it finds.

    def _make_head(self, classes: Sequence[str]) -> None:
        self.classes = list(classes)
        self.head = nn.Linear(self.num_features, len(self.classes))
        self.val_report, self.test_report = Report(self.classes), Report(self.classes)

    def setup(self, stage: str) -> None:
        """Give the head the size of the data, or see that it has it."""
        classes = getattr(getattr(self.trainer, "datamodule", None), "classes", None)
        if self.head is None:
            if classes is None:
                raise InvalidValueError(
                    "MultilabelClassifier does not know its number of classes: give num_classes, or "
                    "a data module with `classes`"
                )
            self._make_head(classes)
            self.to(self.device)
        elif classes is not None:
            self.check_classes(classes)

    def check_classes(self, classes: Sequence[str]) -> None:
        """Raise ValueError unless the head was made for these classes; take over their names."""
        if len(classes) != len(self.classes):
            raise InvalidValueError(
                f"the head has {len(self.classes)} classes, the data has {len(classes)}: give the "
                "data that it was trained with, or train a new head"
            )
        known = not all(name == f"class {i}" for i, name in enumerate(self.classes))
        for i, (own, other) in enumerate(zip(self.classes, classes, strict=True)):
            if known and own != other:
                raise InvalidValueError(
                    f"class {i} of the head is {own!r}, of the data {other!r}: give the data that "
                    "it was trained with, or train a new head"
                )
        self.classes = list(classes)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the names of the classes with the head, and what the images were made by."""
        checkpoint["classes"] = self.classes
        preprocess = getattr(getattr(self._trainer, "datamodule", None), "preprocess", None)
        if isinstance(preprocess, Preprocess):
            checkpoint["preprocess"] = asdict(preprocess)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the head that was saved."""
        classes = checkpoint.get("classes")
        if classes is None:
            raise InvalidValueError(
                "the checkpoint names no classes: it was not written by a MultilabelClassifier"
            )
        if self.head is None:
            self._make_head(classes)
        else:
            self.check_classes(classes)

    def train(self, mode: bool = True) -> "MultilabelClassifier":
        """Switch to training, where a frozen backbone stays in eval mode."""
        super().train(mode)
        if not self.train_backbone:
            self.backbone.eval()
        return self

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k"]:
        """Return a logit for each class."""
        return self._logits(self.backbone(images))

    def _logits(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        assert self.head is not None, "made by setup()"
        logits: Tensor = self.head(features)
        return logits

    def _evaluate(self, inputs: Tensor) -> Float[Tensor, "b k"]:
        return self._logits(inputs) if inputs.ndim == 2 else self(inputs)

    def _loss(
        self, logits: Float[Tensor, "b k"], labels: Float[Tensor, "b k"]
    ) -> tuple[Float[Tensor, ""], Tensor]:
        """Return the mean over the labels that count, and how many images have such."""
        weight = (labels >= 0).to(logits)
        loss = nn.functional.binary_cross_entropy_with_logits(
            logits, labels.clamp(min=0), weight, reduction="sum"
        )
        return loss / weight.sum().clamp(min=1), weight[:, 0].sum()

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        loss, _ = self._loss(self._evaluate(batch[0]), batch[1])
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Judge a batch."""
        self._judge(batch, self.val_report)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Judge a batch."""
        self._judge(batch, self.test_report)

    def _judge(self, batch: Sequence[Tensor], report: Report) -> None:
        logits = self._evaluate(batch[0])
        report.update(*self._loss(logits, batch[1]), logits, batch[1])

    def on_validation_epoch_end(self) -> None:
        """Log what the whole set gave."""
        self._log_report("val", self.val_report)

    def on_test_epoch_end(self) -> None:
        """Log what the whole set gave."""
        self._log_report("test", self.test_report)

    def _log_report(self, stage: str, report: Report) -> None:
        values = {f"{stage}/{k}": v for k, v in report.compute(self.per_class).items()}
        # Every process has the same values: torchmetrics has gathered them. sync_dist says so.
        self.log_dict(values, sync_dist=True)
        report.reset()

    def predict_step(self, batch: Any, batch_idx: int) -> Float[Tensor, "b k"]:
        """Return the score in [0, 1] of each class."""
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        return torch.sigmoid(self._evaluate(inputs))

    def configure_optimizers(self) -> Any:
        """Return the optimizer of what learns, and its schedule."""
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        if self.lr_scheduler is None:
            return optimizer
        schedule = {"scheduler": self.lr_scheduler(optimizer), "monitor": "val/loss"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}
