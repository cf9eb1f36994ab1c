"""How faithful a map is: functions over curves, and the same as torchmetrics."""

from lightning_aop.metrics.faithfulness import (
    DeletionAUC,
    Faithfulness,
    InsertionAUC,
    OverallAUC,
)
from lightning_aop.metrics.functional import (
    BLUR,
    RISE_BLUR,
    auc,
    deletion_curve,
    deletion_insertion_curves,
    insertion_curve,
)

__all__ = [
    "BLUR",
    "RISE_BLUR",
    "DeletionAUC",
    "Faithfulness",
    "InsertionAUC",
    "OverallAUC",
    "auc",
    "deletion_curve",
    "deletion_insertion_curves",
    "insertion_curve",
]
