"""Overall AUC against model evaluations, with every method of a benchmark's run on it.

    python benchmarks/fewer_evaluations.py RUN_DIR [--photos odd] [--reference SIGCAM] [--plot FILE]

Prints a table in Markdown: the mean overall AUC of each method, and its paired difference to a
reference, with 95 % intervals of a bootstrap over the photos. What was chosen on one half of the
photos is to be judged on the other: `--photos even` takes the 1st, 3rd, 5th … of them (those numbered
0, 2, 4 …), `odd` the others. Methods that are not finished are left out, and so are networks on which
the reference is not. GreedyRanking, where it is among the methods, is drawn as a line: the ceiling.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_aop.experiments.tables import Column, Interval, bootstrap, load
from lightning_aop.tables import formatted

OURS = "#d32f2f"
OTHERS = "#3b5b8c"
CONTROLS = "#8a8a8a"
CEILING = "GreedyRanking"


@dataclass(frozen=True)
class Point:
    """A method on a network, in percent; None for the difference of the reference to itself."""

    network: str
    method: str
    evaluations: float
    overall: Interval
    difference: Interval | None
    images: int


def points(columns: list[Column], reference: str, part: slice) -> list[Point]:
    """Return what there is of each network, and of the mean over all networks."""
    methods = list(dict.fromkeys(column.method for column in columns))
    by_name = {(c.network, c.method): c for c in columns if c.seen[part].all()}
    values = {key: column.figures["overall"][part] for key, column in by_name.items()}
    keys = [key for key in values if (key[0], reference) in values]
    networks = list(dict.fromkeys(network for network, _ in keys))
    if not networks:
        raise SystemExit(f"{reference} is finished on no network; --reference names another")
    stacked = np.stack(
        [values[key] for key in keys] + [values[key] - values[key[0], reference] for key in keys],
        axis=1,
    )
    means, drawn = bootstrap(100 * stacked, 2000)
    at = {key: i for i, key in enumerate(keys)}

    def interval(own: list[int]) -> Interval:
        low, high = np.quantile(drawn[:, own].mean(axis=1), (0.025, 0.975))
        return Interval(float(means[own].mean()), float(low), float(high))

    found = []
    for network in [*networks, *(["mean"] if len(networks) > 1 else [])]:
        for method in methods:
            own = [
                (n, method)
                for n in ([network] if network != "mean" else networks)
                if (n, method) in at
            ]
            if len(own) < (len(networks) if network == "mean" else 1):
                continue
            places = [at[key] for key in own]
            cost = np.mean([np.nanmean(by_name[key].figures["evaluations"][part]) for key in own])
            difference = interval([len(keys) + place for place in places])
            found.append(
                Point(
                    network,
                    method,
                    float(cost),
                    interval(places),
                    None if method == reference else difference,
                    sum(int(np.isfinite(values[key]).sum()) for key in own),
                )
            )
    return found


def markdown(found: list[Point], reference: str) -> str:
    """Return a row for each method, and two columns for each network."""
    networks = list(dict.fromkeys(point.network for point in found))
    methods = list(dict.fromkeys(point.method for point in found))
    by_name = {(point.network, point.method): point for point in found}
    # Of a single network there is no mean.
    overall = "mean" if "mean" in networks else networks[0]
    rows = []
    for method in sorted(methods, key=lambda m: _cost(found, m)):
        own = [by_name.get((network, method)) for network in networks]
        row = [method, f"{_cost(found, method):,.0f}"]
        row += ["" if point is None else point.overall.told() for point in own]
        mean = by_name.get((overall, method))
        apart = None if mean is None else mean.difference
        rows.append([*row, "" if apart is None else apart.told(plus=True)])
    header = ["", "evaluations", *networks, f"{overall}, minus {reference}"]
    return formatted(header, rows, "markdown")


def _cost(found: list[Point], method: str) -> float:
    return float(np.mean([point.evaluations for point in found if point.method == method]))


def plot(found: list[Point], photos: str) -> Figure:
    """Return a panel for each network and one for their mean; what costs nothing stands at 1."""
    networks = list(dict.fromkeys(point.network for point in found))
    rows, columns = (2, -(-len(networks) // 2)) if len(networks) > 1 else (1, 1)
    size = (5.5 * columns, 4.1 * rows) if len(networks) > 1 else (7.5, 5.0)
    figure = Figure(figsize=size, layout="constrained", dpi=130)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for axis, network in zip(panels, networks, strict=False):
        _panel(axis, [point for point in found if point.network == network])
        axis.set_title("mean of the networks" if network == "mean" else network, fontsize=11)
    figure.supxlabel("model evaluations per image (log scale)", fontsize=10)
    figure.supylabel(
        "overall AUC in % (insertion \N{MINUS SIGN} deletion), 95 % intervals", fontsize=10
    )
    figure.suptitle(photos, fontsize=10, color="#555555")
    return figure


def _panel(axis: Axes, found: list[Point]) -> None:
    line = []
    names = []
    for point in sorted(found, key=lambda p: p.evaluations):
        if point.method == CEILING:
            _ceiling(axis, point)
            continue
        ours = point.method.startswith("fast_sigcam")
        controls = point.method in ("random", "centre gaussian")
        colour = OURS if ours else CONTROLS if controls else OTHERS
        place = max(point.evaluations, 1.0)
        centre = point.overall.mean
        reach = [[centre - point.overall.low], [point.overall.high - centre]]
        axis.errorbar(place, centre, yerr=reach, color=colour, alpha=0.28, lw=1.2, zorder=1)
        axis.plot(place, centre, "o", color=colour, ms=5.5, zorder=3)
        if ours:
            line.append((place, centre))
            axis.annotate(
                point.method.removeprefix("fast_sigcam"),
                (place, centre),
                (-4, 5),
                textcoords="offset points",
                color=colour,
                fontsize=7.5,
                ha="right",
            )
        else:
            names.append((place, centre, point.method, colour))
    if line:
        axis.plot(*zip(*line, strict=True), color=OURS, lw=1.6, zorder=2)
        axis.annotate(
            "fast_sigcam(iterations)",
            line[0],
            (6, -11),
            textcoords="offset points",
            color=OURS,
            fontsize=7.5,
        )
    axis.set_xscale("log")
    axis.set_xlim(0.8, 9000)
    axis.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.2, lw=0.6)
    _named(axis, names)


def _ceiling(axis: Axes, point: Point) -> None:
    """Draw what the greedy ranking reached as a line, with its interval as a band."""
    axis.axhline(point.overall.mean, color=CONTROLS, lw=1.4, ls="--", zorder=0)
    axis.axhspan(point.overall.low, point.overall.high, color=CONTROLS, alpha=0.12, lw=0, zorder=0)
    axis.annotate(
        f"ceiling: {CEILING}, {point.evaluations:,.0f} evaluations",
        (1.0, point.overall.mean),
        (0, 3),
        textcoords="offset points",
        fontsize=7.5,
        color=CONTROLS,
    )


def _named(axis: Axes, names: list[tuple[float, float, str, str]]) -> None:
    """Write each method's name beside its point; names that would overlap move apart."""
    gap = 2.0
    sides = {
        "near": (0.0, 10.0),
        "left": (10.0, 300.0),
        "right": (300.0, 900.0),
        "beyond": (900.0, np.inf),
    }
    for side, (low, high) in sides.items():
        clusters: dict[int, list[tuple[float, float, str, str]]] = {}
        for label in names:
            if low <= label[0] < high:
                place = 0 if side in ("near", "right") else round(4 * np.log10(label[0]))
                clusters.setdefault(place, []).append(label)
        for near in clusters.values():
            near.sort(key=lambda label: label[1])
            heights = [label[1] for label in near]
            for i in range(1, len(near)):
                heights[i] = max(heights[i], heights[i - 1] + gap)
            down = np.mean(heights) - np.mean([label[1] for label in near])
            for (x, y, name, colour), height in zip(near, heights, strict=True):
                axis.annotate(
                    name,
                    (x, y),
                    (x / 1.17 if side == "right" else x * 1.17, height - down),
                    color=colour,
                    fontsize=7.5,
                    va="center",
                    ha="right" if side == "right" else "left",
                )


def main(words: Sequence[str] | None = None) -> None:
    """Print the table, and draw the plot where it is wanted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the output folder of a benchmark")
    parser.add_argument("--photos", choices=["all", "even", "odd"], default="all")
    parser.add_argument("--reference", default="SIGCAM")
    parser.add_argument("--plot", type=Path, help="write the picture here")
    arguments = parser.parse_args(words)
    part = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}
    _, columns = load(arguments.run)
    found = points(columns, arguments.reference, part[arguments.photos])
    print(markdown(found, arguments.reference))
    if arguments.plot:
        count = max(point.images for point in found if point.network != "mean")
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(found, f"{count} photos").savefig(arguments.plot)


if __name__ == "__main__":
    main()
