"""How faithful a map is, and whether it points at the objects: functions, and torchmetrics."""

from lightning_aop.metrics.faithfulness import (
    DeletionAUC,
    Faithfulness,
    InsertionAUC,
    OverallAUC,
)
from lightning_aop.metrics.functional import (
    BLUR,
    RISE_BLUR,
    CurveEstimate,
    auc,
    deletion_curve,
    deletion_insertion_curves,
    estimate_curves,
    insertion_curve,
)
from lightning_aop.metrics.pointing import (
    EnergyPointingGame,
    PointingGame,
    energy_in_mask,
    pointing_hits,
)

__all__ = [
    "BLUR",
    "RISE_BLUR",
    "CurveEstimate",
    "DeletionAUC",
    "EnergyPointingGame",
    "Faithfulness",
    "InsertionAUC",
    "OverallAUC",
    "PointingGame",
    "auc",
    "deletion_curve",
    "deletion_insertion_curves",
    "energy_in_mask",
    "estimate_curves",
    "insertion_curve",
    "pointing_hits",
]
