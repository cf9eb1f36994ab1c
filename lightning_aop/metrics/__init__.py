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
from lightning_aop.metrics.grid import GridPointing, grid_pointing, tiled
from lightning_aop.metrics.judges import ROAD, Infidelity, infidelity, road
from lightning_aop.metrics.pointing import (
    EnergyPointingGame,
    PointingGame,
    energy_in_mask,
    pointing_hits,
)

__all__ = [
    "BLUR",
    "RISE_BLUR",
    "ROAD",
    "CurveEstimate",
    "DeletionAUC",
    "EnergyPointingGame",
    "Faithfulness",
    "GridPointing",
    "Infidelity",
    "InsertionAUC",
    "OverallAUC",
    "PointingGame",
    "auc",
    "deletion_curve",
    "deletion_insertion_curves",
    "energy_in_mask",
    "estimate_curves",
    "grid_pointing",
    "infidelity",
    "insertion_curve",
    "pointing_hits",
    "road",
    "tiled",
]
