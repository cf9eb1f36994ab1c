"""F_c, the score that an explanation explains: logits [B, K] and targets [B] give scores [B].

`softmax` for single-label classifiers, `sigmoid` for multilabel ones, `value` for numbers to predict,
`logit` for none of these, and `contrast()` for what tells a class from the likeliest others. All are
in float32 or wider: exp(11.1) already overflows in half precision.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_aop.errors import InvalidValueError
from lightning_aop.types import Targets

__all__ = ["Score", "contrast", "logit", "sigmoid", "softmax", "value"]

if TYPE_CHECKING:
    _Scores: TypeAlias = Float[Tensor, " b"]
else:
    # jsonargparse takes a callable that returns a class for a recipe of objects of that class: it
    # refuses a plain function for it, and leaves a default as its name.
    _Scores = Any

Score: TypeAlias = Callable[[Float[Tensor, "b k"], Targets], _Scores]
"""A differentiable function that picks one number for each image out of its logits."""


def full_precision(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return half precision as float32, and anything wider as it is."""
    return values.to(_wide(values.dtype))


@lru_cache  # a pass asks several times
def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def logit(logits: Float[Tensor, "b k"], targets: Targets) -> Float[Tensor, " b"]:
    """Return the raw output of the class, unbounded."""
    return full_precision(logits).gather(1, targets.long()[:, None]).squeeze(1)


def softmax(logits: Float[Tensor, "b k"], targets: Targets) -> Float[Tensor, " b"]:
    """Return the probability in [0, 1] of the class among all classes."""
    return logit(torch.softmax(full_precision(logits), dim=1), targets)


def sigmoid(logits: Float[Tensor, "b k"], targets: Targets) -> Float[Tensor, " b"]:
    """Return the probability in [0, 1] of the class on its own, as BCEWithLogitsLoss trains it."""
    return torch.sigmoid(logit(logits, targets))


def value(logits: Float[Tensor, "b k"], targets: Targets) -> Float[Tensor, " b"]:
    """Return what a model predicts, or its negative: the columns are values, then their negatives.

    What raises the negative lowers the value, so that both can be explained.
    """
    return logit(logits, targets)


def contrast(gamma: float = 0.6, references: int = 3) -> Score:
    """Return the score z_c − γ · mean(z_refs): why this class rather than the likeliest others.

    What speaks for those classes just as much cancels out in part, at no further evaluation (Finer-CAM,
    CVPR 2025). The references are the likeliest other classes of each image that is evaluated; choosing
    them has no gradient. A difference of logits: it is unbounded, and its zero means nothing.

    Args:
        gamma: γ, how much the references count; 0 is `logit`.
        references: how many; all others where there are fewer.

    Raises:
        ValueError: `gamma` is negative, or `references` is below 1.
    """
    if gamma < 0 or references < 1:
        raise InvalidValueError(
            f"contrast needs gamma of 0 or more and references of 1 or more, got gamma={gamma} and "
            f"references={references}: take scores.logit for no reference"
        )
    return _Contrast(gamma, references)


@dataclass(frozen=True)
class _Contrast:
    gamma: float
    references: int

    def __repr__(self) -> str:
        return f"contrast(gamma={self.gamma}, references={self.references})"

    def __call__(self, logits: Float[Tensor, "b k"], targets: Targets) -> Float[Tensor, " b"]:
        if logits.shape[1] < 2:
            raise InvalidValueError(
                "contrast compares classes, and the model has one: take scores.logit or sigmoid"
            )
        wide, own = full_precision(logits), targets.long()[:, None]
        others = wide.scatter(1, own, -torch.inf)
        likeliest = others.topk(min(self.references, logits.shape[1] - 1), dim=1).indices
        return logit(logits, targets) - self.gamma * wide.gather(1, likeliest).mean(dim=1)


def contrasts(score: Score | None) -> bool:
    """Tell whether a score compares classes: of such a number only differences mean something."""
    return isinstance(score, _Contrast)


def shown(score: Score, logits: Float[Tensor, "b k"], targets: Targets) -> Float[Tensor, " b"]:
    """Return the score as it is shown: of `value` the value, whichever direction is explained."""
    if score is value:
        targets = targets % (logits.shape[1] // 2)
    return score(logits, targets)


def of_all_classes(score: Score, logits: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    """Return the score of every class of every image."""
    if score is softmax:
        return torch.softmax(full_precision(logits), dim=1)
    if score is sigmoid:
        return torch.sigmoid(full_precision(logits))
    classes = torch.arange(logits.shape[1], device=logits.device)
    columns = [score(logits, index.expand(len(logits))) for index in classes]
    return torch.stack(columns, dim=1)
