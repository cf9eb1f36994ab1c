"""`lightning-aop sanity-check`: do a method's maps change when the network forgets what it learnt?"""

import json
import math
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from jsonargparse import Namespace

from lightning_aop.cli.photos import Label, load, progress, read_pairs
from lightning_aop.cli.store import MapStore, make_folder, write_csv
from lightning_aop.errors import UserError
from lightning_aop.methods.names import make_method
from lightning_aop.metrics.randomization import parameter_randomization, weighted_layers
from lightning_aop.tables import decimals, formatted
from lightning_aop.view.png import write_png
from lightning_aop.view.table import map_table


def main(options: Namespace) -> int:
    """Randomise, explain, compare and draw, layer by layer."""
    if options.cell < 32:
        raise UserError(f"--cell {options.cell}: must be 32 pixels or more")
    make_method(options.method, option="--method")  # refused before the network is loaded
    make_folder(options.output)
    recipe = load(options)
    method = make_method(options.method, options.target_layer, recipe.score)
    pairs, failures = read_pairs(recipe, options)
    if pairs is None:
        return 1
    images, targets = pairs.images, pairs.targets
    known = weighted_layers(recipe.model, images)
    layers = options.layers or known
    if unknown := [layer for layer in layers if layer not in known]:
        raise UserError(
            f"--layers {unknown[0]}: {options.model} has no such layer with weights; it has "
            f"{', '.join(known)}"
        )
    # The weights of a layer depend on the seed and its name, and on those before it if cascading.
    settings = (options.method, options.target_layer, options.mode, options.seed, layers)
    fields = ("map", "original", "rank_correlation", "ssim")
    store = MapStore(options.output / "maps", recipe.model, settings, fields)
    keys = [store.key(*pair, method) for pair in zip(images, targets, strict=True)]
    entries: dict[str, list[dict[str, Any]]] = {}
    for layer in layers:
        kept = [store.read(key, layer) for key in keys]
        if None not in kept:
            entries[layer] = [entry for entry in kept if entry is not None]
    steps = parameter_randomization(
        recipe.model,
        images,
        targets,
        method,
        mode=options.mode,
        layers=layers,
        seed=options.seed,
        skip=list(entries),
    )
    title = f"{options.model} · {options.method} · {recipe.score_name} score"
    bar_of = len(layers) * len(keys)
    with progress(recipe.model, bar_of) as bar:
        bar.update(len(entries) * len(keys))
        for step in steps:
            entries[step.layer] = [
                {
                    "map": found,
                    "original": original,
                    "rank_correlation": float(correlation),
                    "ssim": float(similarity),
                }
                for found, original, correlation, similarity in zip(
                    step.maps, step.original, step.rank_correlation, step.ssim, strict=True
                )
            ]
            for key, entry in zip(keys, entries[step.layer], strict=True):
                store.write(key, step.layer, entry)
            bar.update(len(keys))
            _write_rows(options.output, pairs.labels, pairs.photos, layers, entries)
    done = [layer for layer in layers if layer in entries]
    originals = [entry["original"] for entry in entries[done[0]]]
    everyone = range(len(keys))
    picture = map_table(
        images.cpu(),
        [[originals[i], *(entries[layer][i]["map"] for layer in done)] for i in everyone],
        ["as trained", *("\n".join(layer.rsplit(".", 1)) for layer in done)],
        [["", *(_caption(entries[layer][i]) for layer in done)] for i in everyone],
        [f"{pairs.labels[i]}\n{pairs.photos[i].name}" for i in everyone],
        title=f"{title}\nafter {options.mode} randomisation of each layer: rank correlation and SSIM "
        "with the map as trained",
        mean=recipe.mean,
        std=recipe.std,
        cell=options.cell,
        percentile=99,
    )
    write_png(picture, options.output / "sanity_check.png")
    _write_rows(options.output, pairs.labels, pairs.photos, layers, entries)
    wrote = f"wrote {options.output / 'sanity_check.png'} and {options.output / 'results.csv'}"
    means = {layer: _means(entries[layer]) for layer in done}
    # A blank map, which a network gives that has died of its random weights, says nothing.
    blank = {layer: sum(_is_blank(entry) for entry in entries[layer]) for layer in done}
    drawn = [layer for layer in done if blank[layer] < len(entries[layer])]
    found = {layer: abs(means[layer]["rank_correlation"]) for layer in drawn}
    passed, verdict = _verdict(options.method, options.mode, found)
    if options.json:
        for layer, values in means.items():
            print(json.dumps({"layer": layer, **values, "blank_maps": blank[layer]}))
        made = {"method": options.method, "model": options.model, "mode": options.mode}
        print(json.dumps({"passes": passed, "threshold": THRESHOLD, "verdict": verdict, **made}))
        print(wrote, file=sys.stderr)
        return 1 if failures else 0
    header, notes = [f"randomised {options.mode}", "rank correlation", "SSIM"], []
    lines = [[layer, *(decimals(value) for value in own.values())] for layer, own in means.items()]
    if any(blank.values()):
        header.append("blank maps")
        lines = [
            [*line, f"{blank[layer]} of {len(keys)}"]
            for line, layer in zip(lines, done, strict=True)
        ]
        notes = ["A blank map says nothing; layers with no other don't count for the verdict."]
    print(formatted(header, lines, notes=["Each value is the mean over the photos.", *notes]))
    print(f"\n{verdict}\n\n{wrote}")
    return 1 if failures else 0


THRESHOLD = 0.5
"""The rank correlation, either way, below which a map counts as changed: its square says that a quarter
of the variance of the ranks is shared. Adebayo et al. (2018) compare methods and set no threshold."""


def _means(entries: list[dict[str, Any]]) -> dict[str, float]:
    return {name: fmean(entry[name] for entry in entries) for name in ("rank_correlation", "ssim")}


def _verdict(method: str, mode: str, found: dict[str, float]) -> tuple[bool | None, str]:
    """Return whether the maps depend on the weights, None where it can't be said, and in words."""
    source = (
        f"threshold {THRESHOLD}, ours: Adebayo et al. 2018 (arXiv:1810.03292) set none; compare with "
        "--method edges, which never changes"
    )
    known = {layer: value for layer, value in found.items() if not math.isnan(value)}
    if not known:
        return None, f"no verdict on {method}: with random weights its maps are blank ({source})"
    if mode == "cascading":
        # All layers up to the last one are random by then.
        layer = next(reversed(known))
        when = f"with random weights from the output to {layer}"
    else:
        layer = min(known, key=lambda name: known[name])
        when = f"with random weights in {layer}, which changes them most"
    passed = known[layer] < THRESHOLD
    word, change = ("passes", "change") if passed else ("fails", "hardly change")
    return passed, (
        f"{method} {word}: {when}, its maps {change}: absolute rank correlation "
        f"{known[layer]:.2f} ({source})"
    )


def _is_blank(entry: dict[str, Any]) -> bool:
    lowest, highest = entry["map"].aminmax()
    return bool(lowest == highest)  # the rows of all maps are written after each layer


def _caption(entry: dict[str, Any]) -> str:
    return f"rank {decimals(entry['rank_correlation'])}\nSSIM {decimals(entry['ssim'])}"


def _write_rows(
    folder: Path,
    labels: list[Label],
    photos: list[Path],
    layers: list[str],
    entries: dict[str, list[dict[str, Any]]],
) -> None:
    write_csv(
        folder / "results.csv",
        [
            {
                "photo": photo.name,
                "label": str(label),
                "layer": layer,
                "rank_correlation": entry["rank_correlation"],
                "ssim": entry["ssim"],
                "blank": _is_blank(entry),
            }
            for layer in layers
            if layer in entries
            for photo, label, entry in zip(photos, labels, entries[layer], strict=True)
        ],
    )
