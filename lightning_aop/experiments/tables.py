"""From the results of a run to a table, with 95 % intervals of a bootstrap over the images."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Bool, Float

from lightning_aop.errors import InvalidValueError
from lightning_aop.experiments.paper import reported, reported_overall
from lightning_aop.experiments.results import MANIFEST, Manifest, arrow, parts
from lightning_aop.tables import Format, csv_text, decimals, formatted

Values: TypeAlias = Float[np.ndarray, " n"]

MEASURES = ("deletion", "insertion", "overall")
_FIGURES = (*MEASURES, "evaluations", "seconds", "curve_seconds")
_AT_ONCE = 2**22
"""Weights of the bootstrap that are held at one time, which bounds the memory: 32 MB."""


@dataclass(frozen=True)
class Column:
    """What one method got on one network, by the place of the image; NaN where there is nothing."""

    network: str
    method: str
    figures: dict[str, Values]
    correct: Bool[np.ndarray, " n"]
    seen: Bool[np.ndarray, " n"]
    reasons: Counter[str]


@dataclass(frozen=True)
class Interval:
    """A mean with the 2.5th and 97.5th percentile of its bootstrap."""

    mean: float
    low: float
    high: float

    def told(self, plus: bool = False) -> str:
        """Return it with one decimal and a typographic minus, `plus` with a sign in any case."""
        return _bracketed(self, 1, "+" if plus else "").replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True)
class Row:
    """A line of the table; all values of scores are in [−1, 1].

    Attributes:
        network: its name, or "mean" for the mean over all networks.
        method: its name.
        deletion: AUC.
        insertion: AUC.
        overall: insertion − deletion.
        difference: overall of the reference method minus this one, over the images that both have; None
            for the reference itself.
        paper: what the paper reports for deletion, insertion and overall, in %; None where unknown.
        images: how many the means are over.
        correct: how many of these are classified as they are labelled.
        failed: how many images have no values, though they were tried.
        evaluations: model evaluations for the map of one image.
        seconds: for the map of one image.
        curve_seconds: for its curves.
    """

    network: str
    method: str
    deletion: Interval
    insertion: Interval
    overall: Interval
    difference: Interval | None
    paper: tuple[float | None, float | None, float | None]
    images: int
    correct: int
    failed: int
    evaluations: float
    seconds: float
    curve_seconds: float


@dataclass(frozen=True)
class Table:
    """All rows, and what has to be said beside them."""

    rows: list[Row]
    reference: str
    notes: list[str]


def load(run: Path, everything: bool = False) -> tuple[Manifest, list[Column]]:
    """Return what the last configuration in a folder asked for, and what there is of it.

    Args:
        run: the output folder of a benchmark.
        everything: also what earlier configurations asked for, on the networks of the last.

    Raises:
        ValueError: the folder holds no run.
    """
    manifest = Manifest.read(run)
    if manifest is None:
        raise InvalidValueError(f"{run} holds no {MANIFEST}: name the output folder of a benchmark")
    if everything:
        manifest = manifest.with_everything(run)
    columns: list[Column] = []
    for network, folder in manifest.folders.items():
        columns += _columns(run / folder, network, manifest)
    return manifest, columns


def _columns(folder: Path, network: str, manifest: Manifest) -> Iterator[Column]:
    pa = arrow()
    methods, n = manifest.methods[network], manifest.images
    found = {
        name: Column(
            network,
            name,
            {key: np.full(n, np.nan) for key in _FIGURES},
            correct=np.zeros(n, dtype=bool),
            seen=np.zeros(n, dtype=bool),
            reasons=Counter(),
        )
        for name in methods
    }
    names = ("image", "method_digest", "correct", "reason", *_FIGURES)
    batch: list[object] = []
    by_digest = {digest: name for name, digest in methods.items()}

    def take() -> None:
        whole = pa.concat_tables(batch).unify_dictionaries()
        for digest in whole["method_digest"].unique().to_pylist():
            name = by_digest.get(digest)
            if name is None:
                continue  # an earlier configuration's
            own = whole.filter(pa.compute.equal(whole["method_digest"], digest))
            image = own["image"].to_numpy()
            into = found[name]
            # An image is there twice where a group has grown with data.limit.
            first = np.zeros(len(image), dtype=bool)
            first[np.unique(image, return_index=True)[1]] = True
            fresh = first & (image < n) & ~into.seen[np.minimum(image, n - 1)]
            at = image[fresh]
            into.seen[at] = True
            into.correct[at] = own["correct"].fill_null(False).to_numpy()[fresh]
            for key in _FIGURES:
                into.figures[key][at] = own[key].to_numpy()[fresh]
            reasons = own["reason"].to_numpy()[fresh]
            into.reasons.update(str(words) for words in reasons if words is not None)

    for part in parts(folder, names):
        batch.append(part)
        if len(batch) == 256:
            take()
            batch.clear()
    if batch:
        take()
    yield from found.values()


def bootstrap(
    values: Float[np.ndarray, "n c"], resamples: int = 1000, seed: int = 0
) -> tuple[Float[np.ndarray, " c"], Float[np.ndarray, "r c"]]:
    """Return the mean of each column over the values that are not NaN, and those of each resample.

    All columns see the same resamples of the n rows, so that differences between the means of one
    resample are paired. Memory stays below 100 MB whatever n. A resample without any value of a column
    has no mean of it, NaN.
    """
    n = len(values)
    there = np.isfinite(values)
    # One product gives the sums and the counts.
    both = np.concatenate([np.where(there, values, 0.0), there], axis=1)
    generator = np.random.default_rng(seed)
    drawn = []
    with np.errstate(invalid="ignore"):
        for size in _chunks(resamples, max(1, _AT_ONCE // max(n, 1))):
            rows = generator.integers(n, size=(size, n))
            rows += n * np.arange(size)[:, None]
            weights = np.bincount(rows.ravel(), minlength=size * n).reshape(size, n)
            sums, counts = np.split(weights.astype(np.float64) @ both, 2, axis=1)
            drawn.append(sums / counts)
        sums, counts = np.split(both.sum(axis=0), 2)
        return sums / counts, np.concatenate(drawn)


def summary(
    run: Path,
    images: Literal["all", "correct"] = "all",
    reference: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
    project: int | None = None,
) -> Table:
    """Return the table of a run, finished or not.

    Args:
        run: the output folder of a benchmark.
        images: average over all images with values, or over those that are classified as labelled.
        reference: the method that the others are compared with; by default SIGCAM where it is there,
            else the last that is no control.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        project: say how long this many images would take on one device like those of the run.

    Raises:
        ValueError: there is no run, or no such method.
    """
    manifest, columns = load(run)
    methods = list(dict.fromkeys(column.method for column in columns))
    reference = manifest.reference() if reference is None else reference
    if reference not in methods:
        raise InvalidValueError(
            f"there is no method {reference!r} in {run}; there are {', '.join(methods)}"
        )
    networks = list(manifest.folders)
    if images == "correct":
        columns = [_only_correct(column) for column in columns]
    by_name = {(column.network, column.method): column for column in columns}
    keys, stacked = [], []
    for (network, method), column in by_name.items():
        other = by_name[network, reference]
        for measure in MEASURES:
            keys.append((network, method, measure))
            stacked.append(column.figures[measure])
        keys.append((network, method, "difference"))
        stacked.append(other.figures["overall"] - column.figures["overall"])
    means, drawn = bootstrap(np.stack(stacked, axis=1), resamples, seed)
    mean = dict(zip(keys, means, strict=True))
    resampled = dict(zip(keys, drawn.T, strict=True))

    def interval(network: str, method: str, measure: str) -> Interval:
        chosen = networks if network == "mean" else [network]
        at = np.mean([mean[name, method, measure] for name in chosen])
        around = np.mean([resampled[name, method, measure] for name in chosen], axis=0)
        around = around[np.isfinite(around)]
        low, high = np.quantile(around, (0.025, 0.975)) if len(around) else (np.nan, np.nan)
        return Interval(float(at), float(low), float(high))

    rows = []
    for network in [*networks, *(["mean"] if len(networks) > 1 else [])]:
        for method in methods:
            own = [by_name[n, method] for n in networks if network in (n, "mean")]
            had = [np.isfinite(column.figures["overall"]) for column in own]
            paper = reported(manifest.paper, network, method)
            overall = reported_overall(manifest.paper, method)
            deletion, insertion, both = (interval(network, method, m) for m in MEASURES)
            rows.append(
                Row(
                    network,
                    method,
                    deletion,
                    insertion,
                    both,
                    interval(network, method, "difference") if method != reference else None,
                    (None, None, overall) if network == "mean" else paper or (None, None, None),
                    images=sum(int(there.sum()) for there in had),
                    correct=sum(int((t & c.correct).sum()) for t, c in zip(had, own, strict=True)),
                    failed=sum(sum(column.reasons.values()) for column in own),
                    evaluations=_mean([column.figures["evaluations"] for column in own]),
                    seconds=_mean([column.figures["seconds"] for column in own]),
                    curve_seconds=_mean([column.figures["curve_seconds"] for column in own]),
                )
            )
    notes = list(_notes(manifest, columns, images, reference, resamples))
    if project is not None:
        notes += _projection(rows, networks, project)
    return Table(rows, reference, notes)


def _projection(rows: Sequence[Row], networks: Sequence[str], images: int) -> Iterator[str]:
    """Say what the mean image costs, times the number of images."""
    for network in networks:
        own = [row for row in rows if row.network == network]
        maps, curves = (sum(getattr(r, name) for r in own) for name in ("seconds", "curve_seconds"))
        hours = images * (maps + curves) / 3600
        yield (
            f"{network}: {maps + curves:,.2f} s per image for the maps ({maps:,.2f}) and curves "
            f"({curves:,.2f}) of all methods; {images:,} images are {hours:,.1f} hours of one device"
        )


def _only_correct(column: Column) -> Column:
    return replace(
        column,
        figures={
            key: np.where(column.correct, values, np.nan) for key, values in column.figures.items()
        },
    )


def _notes(
    manifest: Manifest, columns: Sequence[Column], images: str, reference: str, resamples: int
) -> Iterator[str]:
    which = "correctly classified images" if "correct" in (images, manifest.average) else "images"
    yield (
        f"means over {which}, in %, with 95 % intervals of {resamples:,} bootstrap resamples; "
        f"'{reference} minus it' is the difference of the overall AUCs, paired by image"
    )
    for column in columns:
        if (seen := int(column.seen.sum())) < manifest.images:
            yield (
                f"{column.network}, {column.method}: not finished, {seen:,} of "
                f"{manifest.images:,} images"
            )
        for reason, count in column.reasons.most_common(3):
            yield f"{column.network}, {column.method}: {count:,} without values: {reason}"
        if (rest := len(column.reasons) - 3) > 0:
            yield f"{column.network}, {column.method}: and {rest:,} other reasons"


def written(table: Table, form: Format = "text") -> str:
    """Return the table as text, Markdown, LaTeX (with booktabs) or CSV."""
    if form == "csv":
        rows = [dict(_flat(row)) for row in table.rows]
        return csv_text([list(rows[0]), *(row.values() for row in rows)]).rstrip("\n")
    with_paper = any(figure is not None for row in table.rows for figure in row.paper)
    header = [
        "network",
        "method",
        "deletion",
        "insertion",
        "overall",
        f"{table.reference} minus it",
    ]
    header += ["paper: del.", "ins.", "overall"] if with_paper else []
    header += ["images", "correct", "failed", "evaluations", "seconds", "curves, s"]
    lines = []
    for row in table.rows:
        line = [row.network, row.method]
        line += [_told(row.deletion), _told(row.insertion), _told(row.overall)]
        line += ["" if row.difference is None else _told(row.difference, sign="+")]
        line += ["" if f is None else f"{f:.2f}" for f in row.paper] if with_paper else []
        line += [f"{row.images:,}", f"{row.correct:,}", f"{row.failed:,}"]
        line += ["-" if np.isnan(row.evaluations) else f"{row.evaluations:,.1f}"]
        for seconds in (row.seconds, row.curve_seconds):
            line += ["-" if np.isnan(seconds) else f"{seconds:,.3f}"]
        lines.append(line)
    return formatted(header, lines, form, names=2, notes=table.notes)


def _flat(row: Row) -> Iterator[tuple[str, object]]:
    yield from (("network", row.network), ("method", row.method))
    for name in (*MEASURES, "difference"):
        found = getattr(row, name) or Interval(*[float("nan")] * 3)
        for part in ("mean", "low", "high"):
            value = 100 * getattr(found, part)
            key = name if part == "mean" else f"{name}_{part}"
            yield key, "" if np.isnan(value) else round(value, 4)
    for name, value in zip(MEASURES, row.paper, strict=True):
        yield f"paper_{name}", "" if value is None else value
    for name in ("images", "correct", "failed"):
        yield name, getattr(row, name)
    for name in ("evaluations", "seconds", "curve_seconds"):
        yield name, "" if np.isnan(getattr(row, name)) else round(getattr(row, name), 4)


def _told(interval: Interval, sign: Literal["", "+"] = "") -> str:
    if np.isnan(interval.mean):
        return "-"
    percent = Interval(100 * interval.mean, 100 * interval.low, 100 * interval.high)
    return _bracketed(percent, 2, sign)


def _bracketed(interval: Interval, places: int, sign: Literal["", "+"]) -> str:
    values = interval.mean, interval.low, interval.high
    mean, low, high = (decimals(value, places, sign) for value in values)
    return f"{mean} [{low}, {high}]"


def _mean(parts: Sequence[Values]) -> float:
    values = np.concatenate(parts)
    there = values[np.isfinite(values)]
    return float(there.mean()) if len(there) else float("nan")


def _chunks(total: int, size: int) -> Iterator[int]:
    for start in range(0, total, size):
        yield min(size, total - start)
