"""Grid pointing: which quarter does the heat of a class lie in, when four images are tiled into one.

Rao, Böhle and Schiele, *Towards Better Understanding Attribution Methods* (CVPR 2022). The four images
are of different classes and each is recognised, so that where the evidence for a class is, is known
without masks. A map that knows nothing has a quarter of its heat in the right quarter.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_aop.checks import check_batch, require_score, require_tensors
from lightning_aop.errors import InvalidValueError
from lightning_aop.metrics.apart import tell_apart
from lightning_aop.metrics.pointing import energy_in_mask
from lightning_aop.model.adapter import predict
from lightning_aop.scores import Score, softmax
from lightning_aop.types import Images, Maps, SaliencyMethod, Targets

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def grid_pointing(maps: Maps, quarters: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Return the share of each map's heat that lies in the right quarter; 0 without any heat.

    Args:
        maps: saliency of tiled images, finite and not negative.
        quarters: where the image of the explained class is: 0 upper left, 1 upper right, 2 lower left,
            3 lower right.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a side of the maps is odd, a quarter is none of these, or a map holds NaN, infinite
            or negative values.
    """
    require_tensors(maps=maps, quarters=quarters)
    if maps.ndim != 3 or quarters.shape != maps.shape[:1]:
        raise InvalidValueError(
            f"maps must have shape [B, H, W] and quarters [B], got {list(maps.shape)} and "
            f"{list(quarters.shape)}: give one map and one quarter for each tiled image"
        )
    height, width = maps.shape[1:]
    if height % 2 or width % 2 or not bool(((quarters >= 0) & (quarters < 4)).all()):
        raise InvalidValueError(
            f"maps of tiled images have even sides, and quarters lie in 0..3, got maps of {height} x "
            f"{width} and quarters {sorted(set(quarters.tolist()))}: tile images with `tiled`"
        )
    lower = torch.arange(height, device=maps.device) >= height // 2
    right = torch.arange(width, device=maps.device) >= width // 2
    of_pixel = 2 * lower[:, None].long() + right
    return energy_in_mask(maps, of_pixel == quarters.to(maps.device)[:, None, None])


def tiled(images: Images, fours: Int[Tensor, "g 4"]) -> Float[Tensor, "g c 2*h 2*w"]:
    """Return images of twice the size, each of four: the first upper left, the second beside it."""
    upper, lower = (
        torch.cat([images[fours[:, i]], images[fours[:, i + 1]]], dim=3) for i in (0, 2)
    )
    return torch.cat([upper, lower], dim=2)


def choose_fours(
    targets: Sequence[int], scores: Sequence[float], least: float
) -> Int[Tensor, "g 4"]:
    """Return which images are tiled: four of different classes each, those with high scores first.

    Only images whose score is above `least` are; no image is in two.
    """
    left = sorted(
        (row for row, score in enumerate(scores) if score > least), key=lambda row: -scores[row]
    )
    fours: list[list[int]] = []
    while True:
        first_of: dict[int, int] = {}
        for row in left:
            first_of.setdefault(targets[row], row)
        if len(first_of) < 4:
            return torch.tensor(fours, dtype=torch.long).view(-1, 4)
        fours.append(list(first_of.values())[:4])
        left = [row for row in left if row not in fours[-1]]


def shares_of(
    method: SaliencyMethod,
    model: nn.Module,
    images: Images,
    targets: Targets,
    fours: Int[Tensor, "g 4"],
) -> Float[Tensor, " 4*g"]:
    """Return the share of the heat in the right quarter, of each class in each of the tiled images."""
    if not len(fours):
        return images.new_zeros(0)
    fours = fours.to(images.device)
    grids = tiled(images, fours).repeat_interleave(4, dim=0)
    classes = targets.to(images.device)[fours.flatten()]
    quarters = torch.arange(4, device=images.device).repeat(len(fours))
    return grid_pointing(method.explain(model, grids, classes), quarters)


class GridPointing(Metric):
    """The mean share of the heat in the right quarter, in [0, 1]: grid pointing (GridPG), chance 0.25.

    Each update tiles the batch's images, four of different classes in one, and explains each of the four
    classes. The model has to take images of twice the size. NaN where no four could be tiled.

    Args:
        method: what explains.
        score: the class score; only images whose own class has more than `least` are tiled.
        least: see there; "confident" in the paper.
        kwargs: torchmetrics' own arguments, such as `sync_on_compute`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    shares: Tensor
    total: Tensor

    def __init__(
        self, method: SaliencyMethod, score: Score = softmax, least: float = 0.5, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.method, self.score, self.least = method, score, least
        self.add_state("shares", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")
        tell_apart(self, method, score, least)

    def update(self, model: nn.Module, images: Images, targets: Targets) -> None:
        """Tile the images of a batch, explain them, and add the shares of the heat.

        Args:
            model: maps images to logits [B, K].
            images: a batch as the model takes it.
            targets: the class of each.

        Raises:
            TypeError: an argument is no tensor, or the images are not floating point.
            ValueError: the shapes don't fit each other, or a target is no class of the model.
        """
        check_batch(images, targets)
        require_score(self.score)
        logits = predict(model, images)
        classes = logits.shape[1]
        if wrong := sorted({k for k in targets.tolist() if not 0 <= k < classes}):
            raise InvalidValueError(
                f"targets must lie in 0..{classes - 1}, the classes of the model, got {wrong}: give the "
                "index of a class for each image"
            )
        scores = self.score(logits, targets.to(logits.device))
        fours = choose_fours(targets.tolist(), scores.tolist(), self.least)
        shares = shares_of(self.method, model, images, targets, fours)
        self.shares += shares.sum().to(self.shares)
        self.total += len(shares)

    def compute(self) -> Float[Tensor, ""]:
        """Return the mean over all tiled images so far."""
        return self.shares / self.total

    def plot(self, val: Any = None, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw the value, or several of them, as torchmetrics does."""
        return self._plot(val, ax)  # type: ignore[return-value]
