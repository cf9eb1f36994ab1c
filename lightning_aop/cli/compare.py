"""`lightning-aop compare`: many methods on the same photos, in one picture (the paper's Figure 5)."""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from jsonargparse import Namespace
from torch import Tensor

from lightning_aop.cli.photos import (
    Pairs,
    Recipe,
    load,
    progress,
    read_pairs,
)
from lightning_aop.cli.store import MapStore, make_folder, write_csv
from lightning_aop.errors import UserError, did_you_mean
from lightning_aop.methods.names import FIGURE_5, METHODS, make_method
from lightning_aop.metrics import auc, deletion_insertion_curves
from lightning_aop.model.layers import find_target_layer
from lightning_aop.model.passes import count_evaluations
from lightning_aop.tables import decimals, formatted
from lightning_aop.types import Images, SaliencyMethod, Targets
from lightning_aop.view.png import write_png
from lightning_aop.view.table import map_table

_TOGETHER = 8  # pairs that a method explains at once; the results are written after each such group


@dataclass(frozen=True)
class Row:
    """One method on one photo and class."""

    photo: str
    label: str
    method: str
    deletion: float
    insertion: float
    overall: float
    evaluations: float
    seconds: float


_FIELDS = ("map", "deletion", "insertion", "overall", "evaluations", "seconds")


def main(options: Namespace) -> int:
    """Explain, judge and draw; what can't be read or explained is named and left out."""
    names = chosen_methods(options.methods)
    for name, least in (("steps", 1), ("cell", 32)):
        if (value := getattr(options, name)) < least:
            raise UserError(f"--{name} {value}: must be {least} or more")
    make_folder(options.output)
    recipe = load(options)
    pairs, failures = read_pairs(recipe, options)
    if pairs is None:
        return 1
    images, targets, labels, photos = pairs.images, pairs.targets, pairs.labels, pairs.photos
    settings = (options.target_layer, options.steps, recipe.score_name)
    store = MapStore(options.output / "maps", recipe.model, settings, _FIELDS)
    rows: dict[tuple[int, str], Row] = {}
    maps: dict[tuple[int, str], Tensor] = {}

    def keep(i: int, name: str, entry: dict[str, Any]) -> None:
        maps[i, name] = entry["map"]
        judged = {k: v for k, v in entry.items() if k != "map"}
        rows[i, name] = Row(photos[i].name, str(labels[i]), name, **judged)

    if options.target_layer is None:
        with suppress(ValueError, RuntimeError):  # told by the methods that need one
            find_target_layer(recipe.model, images[:1])  # in the evaluations of none
    failed: list[str] = []
    with progress(recipe.model, len(names) * len(photos)) as bar:
        for name in names:
            bar.set_description(name)
            missing = list(range(len(photos)))
            try:
                method = make_method(name, options.target_layer, recipe.score)
                keys = [store.key(*pair, method) for pair in zip(images, targets, strict=True)]
                for i, key in enumerate(keys):
                    if (entry := store.read(key, name)) is not None:
                        missing.remove(i)
                        keep(i, name, entry)
                        bar.update()
                while missing:
                    group = missing[:_TOGETHER]
                    found = _judged(recipe, method, images[group], targets[group], options.steps)
                    for i, entry in zip(group, found, strict=True):
                        store.write(keys[i], name, entry)
                        keep(i, name, entry)
                        bar.update()
                    missing = missing[_TOGETHER:]
            except (ValueError, RuntimeError, ImportError) as error:
                # Not every method works on every network.
                failed.append(name)
                bar.update(len(missing))
                first = str(error).strip().splitlines()[0]
                bar.write(f"lightning-aop: {name}: {first}", file=sys.stderr)
            _write(options, recipe, names, pairs, rows, maps)
    wrote = f"wrote {options.output / 'comparison.png'} and {options.output / 'results.csv'}"
    if options.json:
        for (i, _), row in rows.items():
            score = {**labels[i].values(), "score_function": recipe.score_name}
            print(json.dumps({**asdict(row), "photo": str(photos[i]), **score}))
        print(wrote, file=sys.stderr)
    else:
        print(_summary(names, list(rows.values())))
        print(f"\n{wrote}")
    return 1 if failures or (failed and "all" not in options.methods) else 0


def chosen_methods(words: Sequence[str]) -> list[str]:
    """Return the methods that are meant, each once, in the order of the words.

    Raises:
        UserError: there is no such method.
    """
    several = {"all": tuple(METHODS), "figure5": FIGURE_5}
    names: dict[str, None] = {}
    for word in words:
        if word not in (*METHODS, *several):
            raise UserError(
                f"--methods {word}: there is no such method{did_you_mean(word, [*METHODS, *several])}; "
                f"there are {', '.join(METHODS)}, and 'figure5' and 'all' for several"
            )
        names |= dict.fromkeys(several.get(word, (word,)))
    return list(names)


def _judged(
    recipe: Recipe, method: SaliencyMethod, images: Images, targets: Targets, steps: int
) -> list[dict[str, Any]]:
    start = time.perf_counter()
    with count_evaluations(recipe.model) as count:
        maps = method.explain(recipe.model, images, targets).cpu()
    seconds = time.perf_counter() - start
    curves = deletion_insertion_curves(
        recipe.model, images, maps.to(images.device), targets, steps=steps, score=recipe.score
    )
    deletion, insertion = (auc(curve).cpu() for curve in curves)
    return [
        {
            "map": found,
            "deletion": float(out),
            "insertion": float(into),
            "overall": float(into - out),
            "evaluations": count.total / len(images),
            "seconds": seconds / len(images),
        }
        for found, out, into in zip(maps, deletion, insertion, strict=True)
    ]


def _write(
    options: Namespace,
    recipe: Recipe,
    names: Sequence[str],
    pairs: Pairs,
    rows: dict[tuple[int, str], Row],
    maps: dict[tuple[int, str], Tensor],
) -> None:
    write_csv(options.output / "results.csv", [asdict(row) for row in rows.values()])
    everyone = range(len(pairs.photos))

    def caption(row: Row | None) -> str:
        if row is None:
            return ""
        return f"overall {decimals(row.overall)}\ndel {row.deletion:.2f}  ins {row.insertion:.2f}"

    def heading(name: str) -> str:
        cost = [row.evaluations for (_, method), row in rows.items() if method == name]
        return f"{name}\n{fmean(cost):,.0f} evaluations" if cost else name

    def best(i: int) -> int | None:
        scores = [rows[i, n].overall if (i, n) in rows else -2.0 for n in names]
        return scores.index(max(scores)) if max(scores) > -2.0 and len(names) > 1 else None

    picture = map_table(
        pairs.images.cpu(),
        [[maps.get((i, n)) for n in names] for i in everyone],
        [heading(n) for n in names],
        [[caption(rows.get((i, n))) for n in names] for i in everyone],
        [f"{pairs.labels[i]}\n{pairs.photos[i].name}" for i in everyone],
        title=f"{options.model} · {recipe.score_name} score\n"
        "AUC of deletion (lower is better), insertion (higher), and their "
        f"difference (overall){'; the best of each row in green' if len(names) > 1 else ''}",
        best=[best(i) for i in everyone],
        mean=recipe.mean,
        std=recipe.std,
        cell=options.cell,
        percentile=99,
    )
    write_png(picture, options.output / "comparison.png")


def _summary(names: Sequence[str], rows: Sequence[Row]) -> str:
    """Return the means over the photos as a table."""
    lines = []
    for name in names:
        own = [row for row in rows if row.method == name]
        if own:
            areas = [
                decimals(fmean(getattr(row, key) for row in own), 3)
                for key in ("deletion", "insertion", "overall")
            ]
            evaluations, seconds = (
                fmean(getattr(row, key) for row in own) for key in ("evaluations", "seconds")
            )
            lines.append([name, *areas, f"{evaluations:,.0f}", f"{seconds:.2f}"])
    header = ["method", "deletion", "insertion", "overall", "evaluations", "seconds"]
    return formatted(header, lines, notes=["Each value is the mean over the photos."])
