"""GreedyRanking: how far a ranking of patches can get, at any price."""

from dataclasses import dataclass, field

import torch
from torch import nn

from lightning_aop.checks import require_counts, require_finite
from lightning_aop.errors import InvalidValueError
from lightning_aop.methods.masks import PerturbedScore
from lightning_aop.model.adapter import explaining
from lightning_aop.model.passes import pass_size
from lightning_aop.ops import Baseline, GaussianBlur, min_max
from lightning_aop.scores import Score, softmax
from lightning_aop.types import Images, Maps, Targets

__all__ = ["GreedyRanking"]


@dataclass(frozen=True)
class GreedyRanking:
    """A ranking of patches, each chosen by trying all: a ceiling for benchmarks, not for daily use.

    The image is cut into `cells` × `cells` patches. The patch that comes next is the one that, added to
    those that are ranked already, maximises

        F_c(only these kept) − F_c(these replaced by the baseline),

    which is what insertion minus deletion adds up. So the overall AUC of this map is about the best that
    a ranking of such patches has, though greedy search need not find the best, and shows what
    cheaper methods leave. It says nothing of where the object lies: it is judged by what it optimises,
    and knows no better than the class score. Greedy search for this is TRACE's (ICML 2024) and MDA's
    (ICLR 2025).

    The map falls evenly from 1 for the first patch to 0 for the last. Of equal candidates the first
    is taken, row by row.

    Cost per image: n·(n + 1) − 2 forwards for n = `cells`² patches, no backward: 2,448 with 7 × 7. Of m
    patches that are left, each is evaluated twice; the last has no rival.

    Attributes:
        cells: patches in each direction, 2 or more.
        score: F_c; `softmax`, or `sigmoid` for a multilabel model.
        baseline: the image without information.
        eval_batch_size: perturbed images in one pass of the model, which bounds the memory; None
            for 32, or fewer where memory runs out.
    """

    cells: int = 7
    score: Score = softmax
    baseline: Baseline = field(default_factory=GaussianBlur)
    eval_batch_size: int | None = None

    def __post_init__(self) -> None:
        require_counts("GreedyRanking", cells=self.cells, eval_batch_size=self.eval_batch_size)
        if self.cells < 2:
            raise InvalidValueError(f"GreedyRanking: cells must be 2 or more, got {self.cells}")

    @property
    def evaluations(self) -> int:
        """The model evaluations per image."""
        patches = self.cells**2
        return patches * (patches + 1) - 2

    def explain(self, model: nn.Module, images: Images, targets: Targets) -> Maps:
        """Return the maps [B, H, W] in [0, 1].

        Raises:
            ValueError: the images have fewer pixels than patches in a direction.
        """
        height, width = images.shape[-2:]
        if min(height, width) < self.cells:
            raise InvalidValueError(
                f"GreedyRanking: images of {height} x {width} pixels can't be cut into {self.cells} x "
                f"{self.cells} patches: take fewer cells"
            )
        with explaining(model, images, targets) as (classifier, x, t), torch.no_grad():
            perturbed = PerturbedScore(
                classifier, x, self.baseline(x), t, self.score, self.eval_batch_size
            )
            down, across = (
                torch.arange(side, device=x.device) * self.cells // side for side in x.shape[2:]
            )
            patch_of = down[:, None] * self.cells + across
            patches = self.cells**2
            ranks = torch.zeros(len(x), patches, device=x.device, dtype=x.dtype)
            everyone = torch.arange(len(x), device=x.device)
            for rank in range(patches, 1, -1):
                # The patches that are left, as many of each image.
                left = (ranks == 0).nonzero()[:, 1].view(len(x), rank)
                kept = (ranks > 0)[:, None].repeat(1, rank, 1).scatter(2, left[:, :, None], True)
                gain = torch.empty(len(x) * rank * 2, device=x.device, dtype=x.dtype)
                for part in torch.arange(len(gain), device=x.device).split(
                    pass_size(self.eval_batch_size)
                ):
                    row, candidate, removed = (
                        part // 2 // rank,
                        part // 2 % rank,
                        (part % 2).bool(),
                    )
                    keep = (kept[row, candidate] ^ removed[:, None])[:, patch_of]
                    gain[part] = perturbed.at(keep.to(x), row).to(x)
                require_finite(gain.view(len(x), -1), t, "the class score")
                alone, without = gain.view(len(x), rank, 2).unbind(dim=2)
                best = (alone - without).argmax(dim=1)
                ranks[everyone, left[everyone, best]] = rank
            return min_max(ranks.clamp_min(1)[:, patch_of])
