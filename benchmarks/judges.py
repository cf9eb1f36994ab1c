"""Do the judges of maps agree? Rank correlations between them over methods, on a folder of photos.

    LIGHTNING_AOP_DATA=DATA python benchmarks/judges.py --network squeezenet1_1 --output runs/judges

Networks and photos are those of configs/benchmark/photos_table2.yaml; the predicted class is explained.
A line for each photo is added to OUTPUT/NETWORK.jsonl as it is done, and the same command goes on after
the last one. The tables are printed in Markdown, of an unfinished run too (`--limit 0` does nothing
else).
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import yaml
from jaxtyping import Float
from scipy.stats import rankdata
from torch import nn
from tqdm import tqdm

from lightning_aop.data.images import read_image
from lightning_aop.data.networks import Network
from lightning_aop.experiments.pictures import Pictures
from lightning_aop.experiments.tables import bootstrap
from lightning_aop.files import write_whole
from lightning_aop.methods.names import make_method
from lightning_aop.metrics import auc, deletion_insertion_curves, infidelity, road
from lightning_aop.metrics.functional import normalised
from lightning_aop.ops import Constant
from lightning_aop.tables import formatted
from lightning_aop.types import Images, Targets

METHODS = {
    "random": "random",
    "centre gaussian": "centre",
    "edges": "edges",
    "integrated gradients": "integrated_gradients",
    "GradCAM": "gradcam",
    "GradCAM++": "gradcam++",
    "LayerCAM": "layercam",
    "fast_sigcam()": "fast_sigcam",
    "SIGCAM": "sigcam",
}
# Each with the sign that makes higher better.
JUDGES = {
    "deletion": -1,
    "insertion": 1,
    "overall": 1,
    "overall, normalised": 1,
    "overall, grey": 1,
    "ROAD": 1,
    "infidelity": -1,
}
STEPS = 28  # of the curves, as the monitor has them
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # that ROAD removes

Values: TypeAlias = Float[np.ndarray, "photos methods judges"]


def judged(model: nn.Module, images: Images, targets: Targets, layer: str) -> dict[str, Any]:
    """Return what each judge says of each method's maps, one value for each image."""
    found: dict[str, dict[str, list[float]]] = {}
    for label, name in METHODS.items():
        maps = make_method(name, layer).explain(model, images, targets)
        case = model, images, maps, targets
        deletion, insertion = deletion_insertion_curves(*case, steps=STEPS)
        grey = deletion_insertion_curves(*case, steps=STEPS, baseline=Constant())
        ends = auc(normalised(insertion, "insertion")) - auc(normalised(deletion, "deletion"))
        values = {
            "deletion": auc(deletion),
            "insertion": auc(insertion),
            "overall": auc(insertion) - auc(deletion),
            "overall, normalised": ends,
            "overall, grey": auc(grey[1]) - auc(grey[0]),
            "ROAD": road(*case, shares=SHARES),
            "infidelity": infidelity(*case),
        }
        found[label] = {judge: value.tolist() for judge, value in values.items()}
    return found


def run(
    network: Network,
    data: Pictures,
    output: Path,
    limit: int | None,
    judge: Callable[[nn.Module, Images, Targets, str], object] = judged,
) -> None:
    """Judge the photos that have no line in the file yet."""
    pictures = data.listed()[:limit]
    written = output.read_bytes() if output.exists() else b""
    whole = written[: written.rfind(b"\n") + 1]
    if whole != written:  # a line was cut off
        write_whole(output, whole)
    todo = pictures[whole.count(b"\n") :]
    if not todo:
        return
    model = network.build()
    model.requires_grad_(False)
    preprocess = network.preprocess(data.size, data.resize)
    output.parent.mkdir(parents=True, exist_ok=True)
    done = len(pictures) - len(todo)
    with output.open("a") as file:
        for picture in tqdm(todo, output.stem, initial=done, total=len(pictures)):
            images = preprocess(read_image(data.folder / picture.file))[None]
            with torch.no_grad():
                targets = model(images).argmax(dim=1)
            found = judge(model, images, targets, network.layer or "")
            # NaN, where the normalised area is undefined, becomes NaN again when it is read.
            file.write(json.dumps({"file": picture.file, "values": found}) + "\n")
            file.flush()


def lines(output: Path) -> list[Any]:
    """Return the values of a file's photos; a last line without its end is left out."""
    return [json.loads(line)["values"] for line in output.read_text().split("\n")[:-1]]


def read(output: Path) -> Values:
    """Return all values of a file, higher being better."""
    rows = lines(output)
    table = [
        [[sign * each[m][j][0] for j, sign in JUDGES.items()] for m in METHODS] for each in rows
    ]
    return np.array(table, dtype=float).reshape(len(rows), len(METHODS), len(JUDGES))


def correlations(
    values: Float[np.ndarray, "n methods judges"],
) -> Float[np.ndarray, "n judges judges"]:
    """Return Spearman's correlation between the judges over the methods, for each photo."""
    ranks = rankdata(values, axis=1)  # ties get the mean of their ranks
    ranks -= ranks.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(ranks, axis=1, keepdims=True)
    ranks /= np.where(norms > 0, norms, np.nan)  # where a judge finds all methods alike
    found: np.ndarray = np.einsum("nmi,nmj->nij", ranks, ranks)
    return found


def report(name: str, values: Values) -> str:
    """Return both tables of a network."""
    whole = np.isfinite(values).all(axis=(1, 2))
    values = values[whole]
    signs = np.array(list(JUDGES.values()))
    means = values.mean(axis=0)
    places = rankdata(-means, axis=0).astype(int)
    rows = [
        [
            method,
            *(f"{100 * means[m, j] * signs[j]:.1f} ({places[m, j]})" for j in range(len(signs))),
        ]
        for m, method in enumerate(METHODS)
    ]
    table = formatted(["", *JUDGES], rows, "markdown")
    over_means = correlations(means[None])[0]
    each, drawn = bootstrap(correlations(values).reshape(len(values), -1), 2000)
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
    matrix = []
    for i, judge in enumerate(JUDGES):
        cells = []
        for j in range(len(JUDGES)):
            at = i * len(JUDGES) + j
            single = f"{each[at]:.2f} [{low[at]:.2f}, {high[at]:.2f}]"
            cells.append("" if i == j else f"{over_means[i, j]:.2f}" if i > j else single)
        matrix.append([judge, *cells])
    return (
        f"{name}: {len(values)} photos ({int((~whole).sum())} left out, whose normalised area is "
        f"undefined). Means in %, and the method's place:\n\n{table}\n\nRank correlation over the "
        "methods; above the diagonal the mean over the photos, each photo by itself, with its 95 % "
        "interval, below it that of the means:\n\n"
        f"{formatted(['', *JUDGES], matrix, 'markdown')}\n"
    )


def configured() -> tuple[dict[str, Network], Pictures]:
    """Return the networks of photos_table2.yaml, and its photos in random order."""
    folder = Path(__file__).parent.parent / "configs" / "benchmark"
    config = yaml.safe_load((folder / "photos_table2.yaml").read_text())
    root = os.path.expandvars(config["data"].pop("root"))
    networks = {name: Network(**given) for name, given in config["networks"].items()}
    return networks, Pictures(**config["data"], root=root, shuffle_seed=0)


def main() -> None:
    """Judge, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", default="squeezenet1_1")
    parser.add_argument("--output", type=Path, default=Path("runs/judges"))
    parser.add_argument("--limit", type=int, help="so many photos at first")
    options = parser.parse_args()
    networks, data = configured()
    if options.network not in networks:
        sys.exit(f"--network must be one of {', '.join(networks)}")
    output = options.output / f"{options.network}.jsonl"
    if options.limit != 0:
        run(networks[options.network], data, output, options.limit)
    print(report(options.network, read(output)))


if __name__ == "__main__":
    main()
