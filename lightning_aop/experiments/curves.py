"""Mean deletion and insertion curves of a run with 95 % bands (the paper's Figure 4)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Float, Integer

from lightning_aop.errors import InvalidValueError
from lightning_aop.experiments.results import MANIFEST, Manifest, arrow, parts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAMES = ("deletion", "insertion")
# Okabe and Ito's colours, which the colour-blind can tell apart; the reference's is the strongest.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#56b4e9", "#cc79a7", "#8c6d31", "#666666", "#b8a000")
_REFERENCE = "#d32f2f"


@dataclass
class MeanCurve:
    """The mean of many curves, kept as sums so that all of them need never be held.

    Attributes:
        count: of the curves.
        total: their sum at each point.
        squares: the sum of their squares.
    """

    count: int = 0
    total: Float[np.ndarray, " points"] = field(default_factory=lambda: np.zeros(0))
    squares: Float[np.ndarray, " points"] = field(default_factory=lambda: np.zeros(0))

    def add(self, curves: Float[np.ndarray, "n points"]) -> None:
        """Take some more curves in."""
        if not self.count:
            self.total, self.squares = np.zeros((2, curves.shape[1]))
        self.count += len(curves)
        self.total = self.total + curves.sum(axis=0)
        self.squares = self.squares + (curves**2).sum(axis=0)

    @property
    def mean(self) -> Float[np.ndarray, " points"]:
        """The mean score after each step."""
        return self.total / self.count

    @property
    def half_band(self) -> Float[np.ndarray, " points"]:
        """Half the width of the 95 % interval of the mean at each point, by the normal law."""
        if self.count < 2:
            return np.full_like(self.total, np.nan)
        variance = (self.squares - self.total**2 / self.count) / (self.count - 1)
        half: Float[np.ndarray, " points"] = 1.96 * np.sqrt(variance.clip(0) / self.count)
        return half


def mean_curves(
    run: Path, images: Literal["all", "correct"] = "all"
) -> dict[tuple[str, str, str], MeanCurve]:
    """Return the mean curves of a run, by network, method, and "deletion" or "insertion".

    Those without any curve are left out.

    Args:
        run: the output folder of a benchmark.
        images: average over all images with values, or those that are classified as labelled.

    Raises:
        ValueError: the folder holds no run.
    """
    manifest = Manifest.read(run)
    if manifest is None:
        raise InvalidValueError(f"{run} holds no {MANIFEST}: name the output folder of a benchmark")
    pa = arrow()
    found: dict[tuple[str, str, str], MeanCurve] = {}
    columns = ("image", "method_digest", "correct", "reason", *(f"{game}_curve" for game in GAMES))
    for network, folder in manifest.folders.items():
        methods = manifest.methods[network]
        seen = {name: np.zeros(manifest.images, dtype=bool) for name in methods}
        for part in parts(run / folder, columns):
            for name, digest in methods.items():
                own = part.filter(pa.compute.equal(part["method_digest"], digest))
                fresh = _fresh(own["image"].to_numpy(), seen[name])
                fresh &= own["reason"].is_null().to_numpy()
                if images == "correct":
                    fresh &= own["correct"].fill_null(False).to_numpy()
                own = own.filter(pa.array(fresh))
                if not len(own):
                    continue
                for game in GAMES:
                    curves = own[f"{game}_curve"].combine_chunks()
                    values = curves.flatten().to_numpy().astype(np.float64)
                    mean = found.setdefault((network, name, game), MeanCurve())
                    mean.add(values.reshape(len(own), -1))
    return found


def _fresh(
    image: Integer[np.ndarray, " n"], seen: Bool[np.ndarray, " all"]
) -> Bool[np.ndarray, " n"]:
    """Return which images are asked for and come for the first time, and take note of them."""
    fresh = np.zeros(len(image), dtype=bool)
    fresh[np.unique(image, return_index=True)[1]] = True
    fresh &= image < len(seen)
    fresh[fresh] &= ~seen[image[fresh]]
    seen[image[fresh]] = True
    return fresh


def draw(
    curves: dict[tuple[str, str, str], MeanCurve],
    networks: Sequence[str],
    methods: Sequence[str],
    reference: str,
) -> "Figure":
    """Return a figure with deletion above insertion and a column for each network.

    The curve of the method `reference` stands out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(networks) + 0.4, 5.6), layout="constrained", dpi=150)
    axes = figure.subplots(2, len(networks), sharex=True, sharey=True, squeeze=False)
    colours = {
        name: _REFERENCE if name == reference else _COLOURS[i % len(_COLOURS)]
        for i, name in enumerate(methods)
    }
    for row, game in zip(axes, GAMES, strict=True):
        for axis, network in zip(row, networks, strict=True):
            for name in methods:
                if (curve := curves.get((network, name, game))) is None:
                    continue
                moved = np.linspace(0, 100, len(curve.mean))
                area = 100 * (curve.mean[1:] + curve.mean[:-1]).mean() / 2
                label = f"{name}  {area:.1f}"
                strong = name == reference
                axis.plot(
                    moved, curve.mean, color=colours[name], label=label, lw=1.9 if strong else 1.3
                )
                if curve.count > 1:
                    # Few images have an interval wider than a probability can be.
                    low = (curve.mean - curve.half_band).clip(0)
                    high = (curve.mean + curve.half_band).clip(None, 1)
                    axis.fill_between(moved, low, high, color=colours[name], alpha=0.13, lw=0)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.2, lw=0.6)
            if game == "deletion":
                axis.set_title(network, fontsize=10.5, parse_math=False)
            where = "upper right" if game == "deletion" else "lower right"
            if axis.lines:
                legend = axis.legend(
                    loc=where, fontsize=7.5, frameon=False, title="AUC in %", title_fontsize=7.5
                )
                for text in legend.get_texts():
                    text.set_parse_math(False)  # a $ in a name begins no formula
        row[0].set_ylabel(f"{game}: mean score")
    axes[0, 0].set(xlim=(0, 100), ylim=(0, None))
    figure.supxlabel("pixels moved, most salient first (%)", fontsize=10)
    return figure
