"""Is what fast_sigcam() gains more than skill at its judge's game? Other baselines, and a longer run.

    LIGHTNING_AOP_DATA=DATA python benchmarks/independent.py --limit 16 --output runs/independent

`RankedMask` optimises deletion and insertion with the blur that judges it. This plays the same game with
what it was not optimised for: grey, noise and a narrow blur in place of the removed pixels; and asks
how well a map agrees with that of eight times as many evaluations. Networks and photos are those of
configs/benchmark/photos_table2.yaml, the predicted class is explained, curves have 28 steps. A line
for each photo is added to OUTPUT/NETWORK.jsonl, and the same command goes on after the last one.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from judges import STEPS, configured, lines, run
from torch import nn

from lightning_aop.experiments.tables import Interval, bootstrap
from lightning_aop.methods.aop import fast_sigcam
from lightning_aop.methods.cam import GradCAM
from lightning_aop.metrics import auc, deletion_insertion_curves
from lightning_aop.metrics.similarity import rank_correlation
from lightning_aop.ops import Baseline, Constant, GaussianBlur
from lightning_aop.tables import formatted
from lightning_aop.types import Images, Maps, Targets

LONG = "fast_sigcam(80)"
METHODS: dict[str, Callable[[str], Any]] = {
    "GradCAM": GradCAM,
    "fast_sigcam(4)": partial(fast_sigcam, iterations=4),
    "fast_sigcam()": fast_sigcam,
    "fast_sigcam(20)": partial(fast_sigcam, iterations=20),
    LONG: partial(fast_sigcam, iterations=80),
}


def noise(images: Images) -> Images:
    """Return noise of each channel's mean and standard deviation: one draw, scaled for each image."""
    drawn = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(0))
    mean, std = (f(images, dim=(2, 3), keepdim=True) for f in (torch.mean, torch.std))
    return mean + std * drawn.to(images)


BASELINES: dict[str, Baseline] = {
    "blur, as optimised": GaussianBlur(),
    "narrow blur": GaussianBlur(kernel=25, sigma=6.0),
    "grey": Constant(),
    "noise": noise,
}
COLUMNS = (*BASELINES, "agreement")


def judged(
    model: nn.Module, images: Images, targets: Targets, layer: str
) -> dict[str, list[float]]:
    """Return of each method the overall AUC by baseline, and the agreement with the long run."""
    maps: dict[str, Maps] = {
        name: make(layer).explain(model, images, targets) for name, make in METHODS.items()
    }
    found = {}
    for name, own in maps.items():
        curves = (
            deletion_insertion_curves(model, images, own, targets, steps=STEPS, baseline=baseline)
            for baseline in BASELINES.values()
        )
        overall = [float(auc(insertion) - auc(deletion)) for deletion, insertion in curves]
        found[name] = [*overall, float(rank_correlation(own, maps[LONG]))]
    return found


def report(files: list[Path]) -> str:
    """Return the means over the photos that all networks have, with their 95 % intervals."""
    rows = [lines(file) for file in files]
    count = min(map(len, rows))
    values = np.array([[[each[m] for m in METHODS] for each in one[:count]] for one in rows])
    flat = 100 * values.mean(axis=0).reshape(count, -1)
    means, drawn = bootstrap(flat, 2000)
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
    cells = [Interval(*found).told() for found in zip(means, low, high, strict=True)]
    width = len(COLUMNS)
    table = [[m, *cells[i * width : (i + 1) * width]] for i, m in enumerate(METHODS)]
    said = f"{count} photos, mean of {', '.join(f.stem for f in files)}; agreement is 100 times "
    return f"{said}Spearman's correlation with {LONG}\n\n{formatted(['', *COLUMNS], table, 'markdown')}"


def main() -> None:
    """Judge, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/independent"))
    parser.add_argument("--limit", type=int, help="so many photos")
    options = parser.parse_args()
    networks, data = configured()
    files = [options.output / f"{name}.jsonl" for name in networks]
    for network, file in zip(networks.values(), files, strict=True):
        run(network, data, file, options.limit, judged)
    print(report(files))


if __name__ == "__main__":
    main()
