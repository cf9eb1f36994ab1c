"""All that touches a user's model: evaluate it, look inside it, and leave no trace."""

from lightning_aop.model.adapter import (
    Adapter,
    AdapterError,
    Classifier,
    explaining,
    find_adapter,
    predict,
)
from lightning_aop.model.isolation import foreign_state, is_explaining, isolated, undisturbed
from lightning_aop.model.layers import Capture, TargetLayerError, capture, find_target_layer
from lightning_aop.model.passes import Evaluations, count_evaluations

__all__ = [
    "Adapter",
    "AdapterError",
    "Capture",
    "Classifier",
    "Evaluations",
    "TargetLayerError",
    "capture",
    "count_evaluations",
    "explaining",
    "find_adapter",
    "find_target_layer",
    "foreign_state",
    "is_explaining",
    "isolated",
    "predict",
    "undisturbed",
]
