"""What an explanation of the probe has found, for those who draw it, store it and log it."""

from dataclasses import dataclass, replace

from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_aop.metrics.functional import auc
from lightning_aop.scores import Score


@dataclass(frozen=True)
class Plan:
    """What is explained at one time, on the CPU.

    Attributes:
        all_rows: which picture of the probe each pair has.
        all_targets: which class.
        finite: the pairs whose picture has finite logits; only those can be explained.
        judged: of these, the ones that the metrics are about.
        logits: of all pictures.
    """

    all_rows: Int[Tensor, " p"]
    all_targets: Int[Tensor, " p"]
    finite: Bool[Tensor, " p"]
    judged: Bool[Tensor, " f"]
    logits: Float[Tensor, "b k"]

    @property
    def rows(self) -> Int[Tensor, " f"]:
        """The pictures of the pairs that can be explained."""
        return self.all_rows[self.finite]

    @property
    def targets(self) -> Int[Tensor, " f"]:
        """The classes of the pairs that can be explained."""
        return self.all_targets[self.finite]


@dataclass(frozen=True)
class Found:
    """What is known of P pairs of a picture and a class.

    Attributes:
        rows: which picture of the probe each pair has.
        targets: which class.
        maps: where the model saw it, NaN where that can't be said.
        masks: where it is; empty where that is not known.
        curves: deletion and insertion of each, NaN where they were not measured.
        logits: of all pictures.
        score: F_c.
        values: the figures, by name.
        controls: the figures of maps that know nothing of the model, by their name.
    """

    rows: Int[Tensor, " p"]
    targets: Int[Tensor, " p"]
    maps: Float[Tensor, "p h w"]
    masks: Bool[Tensor, "p h w"]
    curves: Float[Tensor, "p 2 points"]
    logits: Float[Tensor, "n k"]
    score: Score
    values: dict[str, float]
    controls: dict[str, dict[str, float]]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The picture and the class of each map."""
        return list(zip(self.rows.tolist(), self.targets.tolist(), strict=True))

    @property
    def scores(self) -> Float[Tensor, " p"]:
        """F_c of each."""
        return self.score(self.logits[self.rows], self.targets)

    @property
    def blank(self) -> Bool[Tensor, " p"]:
        """The maps that show nothing."""
        flat = self.maps.flatten(1)
        return (flat.amax(dim=1) == flat.amin(dim=1)) | ~flat.isfinite().all(dim=1)

    @property
    def aucs(self) -> Float[Tensor, "p 2"]:
        """Deletion and insertion AUC of each, NaN where they were not measured."""
        return auc(self.curves.flatten(0, 1)).view(-1, 2)

    def only(self, chosen: Int[Tensor, " c"]) -> "Found":
        """Return some of the pairs; the figures stay those of all."""
        there = chosen.to(self.maps.device)
        return replace(
            self,
            rows=self.rows[chosen],
            targets=self.targets[chosen],
            maps=self.maps[there],
            masks=self.masks[chosen.to(self.masks.device)],
            curves=self.curves[there],
        )
