"""RISE: the mean of random masks, weighted by the score that each leaves."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from lightning_aop.checks import require_counts, require_finite
from lightning_aop.errors import InvalidValueError
from lightning_aop.model.adapter import explaining
from lightning_aop.ops import min_max, resize
from lightning_aop.scores import Score, softmax
from lightning_aop.types import Images, Maps, Targets


@dataclass(frozen=True)
class RISE:
    """S = Σ_i F_c(x ⊙ M_i) · M_i / (N·p), the mean of random masks by score (Petsiuk et al. 2018).

    A mask is a grid of cells × cells, each kept with probability p, upsampled bilinearly to
    (cells + 1)·⌈H/cells⌉ × (cells + 1)·⌈W/cells⌉ and cropped to the image at a random offset of less
    than one cell. Removed pixels become 0, the mean of a normalised image. The saliency is min-max
    normalised.

    The masks are drawn from `seed`, the same for every image, so that no image depends on its
    batch. They are upsampled as they are needed, and never held all at once.

    Cost per image: `masks` forwards, no backward.

    Attributes:
        masks: N; the paper takes 4000 for VGG16 and 8000 for ResNet50.
        cells: cells of the grid in each direction; 7 in the paper, 8 in its authors' code.
        probability: p, with which a cell is kept.
        score: F_c; `softmax`, or `sigmoid` for a multilabel model.
        seed: one seed gives one answer.
        eval_batch_size: masked images in one pass of the model, which bounds the memory; None
            for what suits the device, or fewer where memory runs out.
    """

    masks: int = 4000
    cells: int = 7
    probability: float = 0.5
    score: Score = softmax
    seed: int = 0
    eval_batch_size: int | None = None

    def __post_init__(self) -> None:
        require_counts(
            "RISE", masks=self.masks, cells=self.cells, eval_batch_size=self.eval_batch_size
        )
        if not 0 < self.probability < 1:
            raise InvalidValueError(
                f"RISE: probability must lie between 0 and 1, got {self.probability}"
            )

    @property
    def evaluations(self) -> int:
        """The model evaluations per image."""
        return self.masks

    def explain(self, model: nn.Module, images: Images, targets: Targets) -> Maps:
        """Return the maps [B, H, W] in [0, 1]."""
        with explaining(model, images, targets, self.seed) as (classifier, x, t), torch.no_grad():
            saliency = torch.zeros_like(x[:, 0])
            masks = _RandomMasks.drawn(self, x)
            # An image after the other for each mask, so that a pass has few masks to upsample.
            count, first = len(x), 0
            at_once = classifier.pass_size(self.eval_batch_size, self.masks * count, x)
            seen = classifier.repeated(
                lambda images, keep, classes: (
                    classifier.scores(images * keep[:, None], classes, self.score),
                ),
                self.masks * count // at_once,
            )
            for part in torch.arange(self.masks * count, device=x.device).split(at_once):
                rows, mask = part % count, part // count - first // count
                keep = masks.enlarged(first // count, (first + len(part) - 1) // count + 1)
                (scores,) = seen(x[rows], keep[mask], t[rows])
                weights = torch.zeros(count, len(keep), device=x.device, dtype=x.dtype)
                weights[rows, mask] = scores.to(x)
                with torch.autocast(x.device.type, enabled=False):
                    saliency += (weights @ keep.flatten(1)).view_as(saliency)
                first += len(part)
            # A score that isn't finite leaves no finite map.
            require_finite(saliency, t, "the class score")
            return min_max(saliency / (self.masks * self.probability))


@dataclass(frozen=True)
class _RandomMasks:
    """Small grids and where they are cropped after upsampling."""

    grids: Float[Tensor, "n cells cells"]
    tops: Integer[Tensor, " n"]
    lefts: Integer[Tensor, " n"]
    cell: tuple[int, int]
    size: tuple[int, int]

    @classmethod
    def drawn(cls, method: RISE, images: Images) -> "_RandomMasks":
        """Draw grids, then offsets from the top, then offsets from the left."""
        generator = torch.Generator(images.device).manual_seed(method.seed)
        n, cells = method.masks, method.cells
        height, width = images.shape[-2:]
        cell = (math.ceil(height / cells), math.ceil(width / cells))
        # In float32 whatever the images are, so that these don't choose the masks.
        numbers = torch.rand(
            n, cells, cells, generator=generator, device=images.device, dtype=torch.float32
        )
        tops, lefts = (
            torch.randint(side, (n,), generator=generator, device=images.device) for side in cell
        )
        grids = (numbers < method.probability).to(images)
        return cls(grids, tops, lefts, cell, (height, width))

    def enlarged(self, start: int, stop: int) -> Float[Tensor, "m h w"]:
        """Return the masks `start` to `stop` at the images' size."""
        cells = self.grids.shape[1] + 1
        large = resize(self.grids[start:stop], (cells * self.cell[0], cells * self.cell[1]))
        device = large.device
        rows = self.tops[start:stop, None] + torch.arange(self.size[0], device=device)
        columns = self.lefts[start:stop, None] + torch.arange(self.size[1], device=device)
        masks = torch.arange(len(large), device=device)
        return large[masks[:, None, None], rows[:, :, None], columns[:, None, :]]
