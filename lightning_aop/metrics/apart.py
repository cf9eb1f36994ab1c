"""Metrics with other settings in one MetricCollection."""

from zlib import crc32

import torch
from torchmetrics import Metric


def tell_apart(metric: Metric, *settings: object) -> None:
    """Make what tells a metric from others with states of the same names a state.

    A MetricCollection lets metrics share their states for good if these are equal after the first batch,
    as those of blank maps are, or of a model that gives one score for every image.
    """
    rule = torch.tensor(crc32(repr(settings).encode()))
    metric.add_state("rule", rule, dist_reduce_fx="max")
