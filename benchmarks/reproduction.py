"""The measured tables of docs/reproduction.md, every number from the files of a run.

    lightning-aop benchmark photos_table1
    lightning-aop benchmark photos_table2
    python benchmarks/reproduction.py runs/photos [--pointing runs/table3 ...] [--page PAGE]

A run may be unfinished: each table is over the photos that all its methods have, and says how many
those are. With `--page` the parts of that page between its markers are replaced; without, they are
printed. With `--keep FOLDER` the run's values are laid there too, in one file for each network: a run
into a copy of that folder goes on from there.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Float

from lightning_aop.errors import InvalidValueError
from lightning_aop.experiments.paper import method_key, reported_difference, reported_pointing
from lightning_aop.experiments.pointing_game import ClassResult, Result
from lightning_aop.experiments.results import parts, schema, write_part
from lightning_aop.experiments.tables import MEASURES, Column, Interval, bootstrap, load
from lightning_aop.files import write_whole
from lightning_aop.tables import decimals, formatted

TABLE_1 = ("gradcam", "wgradcam", "emp", "igos", "gradcam+emp", "gradcam+igos", "sigcam")
TABLE_2 = ("gradcam", "gradcam++", "igos", "xrai", "sigcam")
REFERENCE = "sigcam"
FAST = "fastsigcam"
# What the paper finds, as (measure, the better method, the other).
ORDERS = (
    *(("overall", REFERENCE, other) for other in dict.fromkeys((*TABLE_1[:-1], *TABLE_2[:-1]))),
    ("overall", "gradcam+igos", "igos"),
    ("overall", "gradcam+igos", "gradcam"),
    ("overall", "gradcam+emp", "emp"),
    ("overall", "gradcam+emp", "gradcam"),
    ("overall", "wgradcam", "gradcam"),
    ("overall", "igos", "emp"),
    ("overall", "igos", "xrai"),
    ("overall", "gradcam", "gradcam++"),
    ("insertion", REFERENCE, "igos"),
    ("insertion", "gradcam+igos", "igos"),
    ("deletion", "igos", "emp"),
    ("deletion", "igos", REFERENCE),
    ("deletion", REFERENCE, "gradcam"),
)
NAMES = {
    "mobilenet_v2": "MobileNetV2",
    "squeezenet1_1": "SqueezeNet 1.1",
    "efficientnet_lite0": "EfficientNet-Lite0",
}
RESAMPLES = 2000
# Multiply-adds of DenseNet201, Inception_v3 and VGG19 for an image of 224 x 224.
IMAGENET = (4.3e9, 2.8e9, 19.6e9)
CURVES = 2 * 112 * len(TABLE_2)  # evaluations of an image, at the 112 steps of table2.yaml

Values: TypeAlias = Float[np.ndarray, " n"]
Masks: TypeAlias = Mapping[str, Bool[np.ndarray, " n"]]


@dataclass(frozen=True)
class Run:
    """What a run has measured: a column for each network and method, by the method's key."""

    columns: Mapping[tuple[str, str], Column]
    names: Mapping[str, str]
    networks: Sequence[str]

    @classmethod
    def of(cls, folder: Path) -> "Run":
        """Read all results of a folder, those of earlier configurations too."""
        manifest, columns = load(folder, everything=True)
        found = {(c.network, method_key(c.method)): c for c in columns}
        names = {method_key(c.method): c.method for c in columns}
        return cls(found, names, list(manifest.folders))

    def shared(self, methods: Sequence[str]) -> Masks:
        """Return the photos that all the methods have, of the networks where there are any."""
        found = {}
        for network in self.networks:
            own = [self.columns.get((network, method)) for method in methods]
            if any(column is None for column in own):
                continue
            values = [column.figures["overall"] for column in own if column is not None]
            there = np.isfinite(np.stack(values)).all(axis=0)
            if there.any():
                found[network] = there
        return found

    def count(self, methods: Sequence[str]) -> int:
        """Return how many photos all the methods have, over all networks."""
        return sum(int(mask.sum()) for mask in self.shared(methods).values()) if methods else 0

    def has(self, method: str) -> bool:
        """Say whether a method has any values."""
        return bool(self.shared([method]))

    def mean(self, photos: Masks, values: Callable[[str], Values]) -> Interval:
        """Return the mean over photos and networks of a value in percent, with its interval.

        The resamples are of photos, the same for all networks.
        """
        columns = [np.where(there, values(network), np.nan) for network, there in photos.items()]
        stacked = 100 * np.stack(columns, axis=1)
        means, drawn = bootstrap(stacked[np.isfinite(stacked).any(axis=1)], RESAMPLES)
        around = drawn.mean(axis=1)
        low, high = np.quantile(around[np.isfinite(around)], (0.025, 0.975))
        return Interval(float(means.mean()), float(low), float(high))

    def value(self, measure: str, method: str) -> Callable[[str], Values]:
        """Return what gives a method's values on a network."""
        return lambda network: self.columns[network, method].figures[measure]

    def difference(self, measure: str, method: str, other: str) -> Callable[[str], Values]:
        """Return what gives a method's values minus another's, photo by photo."""
        one, two = self.value(measure, method), self.value(measure, other)
        return lambda network: one(network) - two(network)


# --------------------------------------------------------------------------------------------------
# the parts of the page


def faithfulness(run: Run) -> str:
    """Return Tables 1 and 2 and the orders."""
    own = [*dict.fromkeys((*TABLE_1, *TABLE_2, FAST))]
    tables = {"Table 1": TABLE_1, "Table 2": (*TABLE_2, FAST)}
    parts = [part for title, methods in tables.items() for part in _table(run, title, methods)]
    counts = {method: run.count([method]) for method in own}
    most = max(counts.values())
    # One slow method keeps its whole table on few photos.
    if all(run.count([m for m in methods if counts[m]]) < most for methods in tables.values()):
        furthest = [method for method in own if counts[method] == most]
        parts += _table(run, "The methods that have the most", furthest)
    parts += _orders(run)
    if any(key not in own for key in run.names):
        every = [key for key in run.names if run.has(key)]
        photos = run.shared(every)
        scores = {m: run.mean(photos, run.value("overall", m)).mean for m in every if photos}
        ranked = sorted(run.names, key=lambda m: scores.get(m, -np.inf), reverse=True)
        parts += _table(run, "Every method", ranked)
    return "\n\n".join([*parts, _spent(run)])


def _table(run: Run, title: str, methods: Sequence[str]) -> Iterator[str]:
    there = [method for method in methods if run.has(method)]
    photos = run.shared(there) if there else {}
    if not photos:
        yield f"{title}: nothing has been measured yet."
        return
    yield f"{title}, {_counted(photos)}:"
    # Of a single network the mean over networks says it all.
    measures = MEASURES if len(photos) > 1 else MEASURES[:2]
    header = [""]
    for network in photos:
        header += [f"{NAMES.get(network, network)}: del.", "ins.", "overall"][: len(measures)]
    header += [
        "overall, mean" if len(photos) > 1 else "overall",
        f"{run.names.get(REFERENCE, 'SIGCAM')} minus it",
        "evaluations",
    ]
    rows = []
    for method in there:
        row = [run.names[method]]
        for network, mask in photos.items():
            for measure in measures:
                row.append(_signed(100 * run.value(measure, method)(network)[mask].mean()))
        row.append(run.mean(photos, run.value("overall", method)).told())
        if method != REFERENCE and REFERENCE in there:
            apart = run.mean(photos, run.difference("overall", REFERENCE, method))
            row.append(apart.told(plus=True))
        else:
            row.append("")
        evaluations = [run.value("evaluations", method)(n)[m].mean() for n, m in photos.items()]
        rows.append([*row, f"{np.mean(evaluations):,.0f}"])
    yield formatted(header, rows, "markdown")
    tried = [method for method in methods if method in run.names and method not in there]
    if tried:
        yield f"Without values, as the run says why: {', '.join(run.names[m] for m in tried)}."
    if missing := [method for method in methods if method not in run.names]:
        yield f"Not measured yet: {', '.join(missing)}."


def _orders(run: Run) -> Iterator[str]:
    rows, verdicts = [], []
    for measure, method, other in ORDERS:
        photos = run.shared([method, other])
        if not photos:
            continue
        # Of a deletion AUC the lower one is the better.
        pair = (other, method) if measure == "deletion" else (method, other)
        found = run.mean(photos, run.difference(measure, *pair))
        paper = reported_difference(measure, *pair)
        verdicts.append(verdict(found))
        counts = sorted({int(mask.sum()) for mask in photos.values()})
        rows.append(
            [
                f"{run.names[method]} before {run.names[other]}",
                measure,
                "" if paper is None else _signed(paper, plus=True),
                found.told(plus=True),
                " to ".join(f"{n:,}" for n in dict.fromkeys((counts[0], counts[-1]))),
                verdicts[-1],
            ]
        )
    if not rows:
        yield "The paper's orders: nothing has been measured yet."
        return
    said = ", ".join(f"*{word}*: {verdicts.count(word)}" for word in VERDICTS)
    yield (
        f"The paper's orders, as points in their favour (for deletion, the other's AUC minus the first "
        f"one's), mean over the networks and the photos that both methods have. Of {len(rows)} orders: "
        f"{said}."
    )
    header = ["order", "AUC", "the paper", "here [95 % interval]", "photos", ""]
    yield formatted(header, rows, "markdown", names=2)


VERDICTS = ("holds", "level", "does not hold")


def verdict(found: Interval) -> str:
    """Say what an interval of points in favour of an order makes of it."""
    if found.low > 0:
        return "holds"
    return "does not hold" if found.high < 0 else "level"


def _spent(run: Run) -> str:
    hours = {
        name: sum(float(np.nansum(c.figures[name])) for c in run.columns.values()) / 3600
        for name in ("seconds", "curve_seconds")
    }
    return (
        f"The maps of all photos, methods and networks took {hours['seconds']:,.1f} hours, their curves "
        f"{hours['curve_seconds']:,.1f}."
    )


def pointing(folders: Sequence[Path]) -> str:
    """Return Table 3, from the results.json of pointing games, whose pairs are pooled."""
    found: dict[str, Result] = {}
    for folder in folders:
        file = folder / "results.json"
        if not file.is_file():
            raise InvalidValueError(
                f"{file}: no such file: name the output folder of a pointing game"
            )
        for told in json.loads(file.read_text()):
            key = method_key(told["method"])
            found[key] = _pooled(found.get(key), told)
    some = next(iter(found.values()))
    wide = max((t for c in some.classes.values() for t in c.hits), key=float)
    classes = {name for result in found.values() for name in result.classes}
    header = ["", "hit", f"within {wide} pixels", "heat in the mask", "evaluations per map"]
    header += ["the paper, ResNet50", f"SIGCAM minus it, within {wide} pixels"]
    rows = []
    for key, result in found.items():
        paper = reported_pointing(key)
        apart = ""
        if key != REFERENCE and REFERENCE in found:
            apart = _over_classes(found[REFERENCE], result, wide).told(plus=True)
        rows.append(
            [
                result.method,
                _signed(100 * result.accuracy(0)),
                _signed(100 * result.accuracy(float(wide))),
                _signed(100 * result.energy),
                f"{result.evaluations / result.pairs:,.0f}",
                "" if paper is None else f"{paper:.2f}",
                apart,
            ]
        )
    return (
        f"{max(result.pairs for result in found.values()):,} pairs of an image and one of "
        f"{len(classes)} classes; intervals of 95 % over the classes, in %:\n\n"
        f"{formatted(header, rows, 'markdown')}"
    )


def _pooled(earlier: Result | None, told: Mapping[str, Any]) -> Result:
    """Return a game's result of a method, with those of other images added."""
    classes = dict(earlier.classes) if earlier else {}
    for name, more in told["classes"].items():
        own = classes.get(name, ClassResult(0, dict.fromkeys(more["hits"], 0.0), 0.0))
        classes[name] = ClassResult(
            own.tested + more["tested"],
            {t: own.hits[t] + hits for t, hits in more["hits"].items()},
            own.energy + more["energy"],
        )
    evaluations = told["evaluations"] + (earlier.evaluations if earlier else 0)
    seconds = told["seconds"] + (earlier.seconds if earlier else 0)
    return Result(told["method"], classes, evaluations, seconds)


def _over_classes(one: Result, two: Result, tolerance: str) -> Interval:
    """Return the difference of two mean accuracies, with its interval over resampled classes."""
    names = [name for name in one.classes if name in two.classes]
    rates = [
        [of.classes[n].hits[tolerance] / of.classes[n].tested for n in names] for of in (one, two)
    ]
    apart = 100 * (np.array(rates[0]) - np.array(rates[1]))
    means, drawn = bootstrap(apart[:, None], RESAMPLES)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Interval(float(means[0]), float(low), float(high))


def imagenet(run: Run) -> str:
    """Return what Table 2 on 50,000 images would take, from what the methods cost here."""
    photos = run.shared(TABLE_2)
    if not photos:
        missing = ", ".join(m for m in TABLE_2 if not run.has(m)) or "photos that all methods share"
        return f"Not measured yet: {missing}."
    cost = sum(
        np.mean([run.value("evaluations", method)(n)[m].mean() for n, m in photos.items()])
        for method in TABLE_2
    )
    total = 50_000 * (cost + CURVES) * len(IMAGENET)
    operations = 2 * total * np.mean(IMAGENET)
    slow, fast = (operations / sustained / 3600 for sustained in (20e12, 100e12))
    seconds = []
    for network, mask in photos.items():
        spent = [
            run.value(name, method)(network)[mask].mean()
            for name in ("seconds", "curve_seconds")
            for method in TABLE_2
        ]
        seconds.append(f"{sum(spent):,.0f} s on {NAMES.get(network, network)}")
    return (
        f"Counted on the photos, Table 2's five methods take {cost:,.0f} evaluations for the maps of an "
        f"image; with {CURVES:,} for its curves, 50,000 images on three networks are "
        f"{total / 1e6:,.0f} million, or {operations / 1e18:.1f} exa-operations. An H200 that sustained "
        f"20 TFLOP/s in float32 would take {slow:,.0f} hours, eight {slow / 8:,.0f} hours; at "
        f"100 TFLOP/s, with TF32 or bf16 (`--trainer.precision bf16-mixed`), {fast:,.0f} and "
        f"{fast / 8:,.0f} hours. Of the photos, all five took {', '.join(seconds)} each."
    )


# --------------------------------------------------------------------------------------------------
# words


def _counted(photos: Masks) -> str:
    counts = {NAMES.get(name, name): int(mask.sum()) for name, mask in photos.items()}
    if len(set(counts.values())) == 1:
        return f"{next(iter(counts.values())):,} photos"
    return "photos: " + ", ".join(f"{name} {n:,}" for name, n in counts.items())


def _signed(value: float, plus: bool = False) -> str:
    return decimals(value, 1, "+" if plus else "").replace("-", "\N{MINUS SIGN}")


def keep(run: Path, folder: Path) -> None:
    """Lay what a run has measured into a folder, in one file for each network, without the curves.

    The curves are nine tenths of a run's bytes, and no table reads them.
    """
    manifest, _ = load(run)
    columns = [field.name for field in schema() if not field.name.endswith("_curve")]
    for own in manifest.folders.values():
        rows: dict[tuple[int, str], dict[str, Any]] = {}
        for part in parts(run / own, columns):
            for row in part.to_pylist():
                # An image is there twice where a group has grown with data.limit.
                rows[row["image"], row["method_digest"]] = row
        earlier = list((folder / own).glob("part-*.parquet"))
        write_part(folder / own, 0, 0, [rows[key] for key in sorted(rows)])
        for file in earlier:
            file.unlink()
    manifest.write(folder)


def replaced(page: str, part: str, text: str) -> str:
    """Return the page with another text between the markers of a part."""
    start, end = f"<!-- measured: {part} -->", f"<!-- end: {part} -->"
    if page.count(start) != 1 or page.count(end) != 1 or page.index(start) > page.index(end):
        raise InvalidValueError(f"the page must have one {start} and, after it, one {end}")
    before, _, rest = page.partition(start)
    return f"{before}{start}\n\n{text}\n\n{end}{rest.partition(end)[2]}"


def main(words: Sequence[str] | None = None) -> None:
    """Print the parts, or write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "run", type=Path, help="the output folder of photos_table1 and photos_table2"
    )
    parser.add_argument(
        "--pointing",
        type=Path,
        nargs="+",
        help="the output folders of pointing games, each on other images",
    )
    parser.add_argument("--page", type=Path, help="replace the parts of this page")
    parser.add_argument("--keep", type=Path, help="lay the run's values into this folder")
    arguments = parser.parse_args(words)
    run = Run.of(arguments.run)
    if arguments.keep:
        keep(arguments.run, arguments.keep)
    found = {"faithfulness": faithfulness(run), "imagenet": imagenet(run)}
    if arguments.pointing:
        found["pointing"] = pointing(arguments.pointing)
    if arguments.page is None:
        print("\n\n".join(found.values()))
        return
    page = arguments.page.read_text(encoding="utf-8")
    for part, text in found.items():
        page = replaced(page, part, text)
    write_whole(arguments.page, page.encode())


if __name__ == "__main__":
    main()
