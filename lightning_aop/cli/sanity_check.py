"""`lightning-aop sanity-check`: do a method's maps change when the network forgets what it learnt?"""

from pathlib import Path
from statistics import fmean
from typing import Any

from jsonargparse import Namespace

from lightning_aop.cli.photos import load, progress, read_pairs
from lightning_aop.cli.store import MapStore, make_folder, write_csv
from lightning_aop.errors import UserError
from lightning_aop.methods.names import make_method
from lightning_aop.metrics.randomization import parameter_randomization, weighted_layers
from lightning_aop.tables import formatted
from lightning_aop.view.png import write_png
from lightning_aop.view.table import map_table


def main(options: Namespace) -> int:
    """Randomise, explain, compare and draw, layer by layer."""
    if options.cell < 32:
        raise UserError(f"--cell {options.cell}: must be 32 pixels or more")
    method = make_method(options.method, options.target_layer, option="--method")
    make_folder(options.output)
    recipe = load(options)
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
    title = f"{options.model} · {options.method}"
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
        title=f"{title} · after {options.mode} randomisation of each layer: rank correlation and "
        "SSIM with the map as trained",
        mean=recipe.mean,
        std=recipe.std,
        cell=options.cell,
        percentile=99,
    )
    write_png(picture, options.output / "sanity_check.png")
    _write_rows(options.output, pairs.labels, pairs.photos, layers, entries)
    lines = []
    for layer in done:
        own = entries[layer]
        means = (fmean(entry[name] for entry in own) for name in ("rank_correlation", "ssim"))
        lines.append([layer, *(f"{mean:.2f}" for mean in means)])
    header = [f"randomised {options.mode}", "rank correlation", "SSIM"]
    print(formatted(header, lines, notes=["Each value is the mean over the photos."]))
    print(f"\nwrote {options.output / 'sanity_check.png'} and {options.output / 'results.csv'}")
    return 1 if failures else 0


def _caption(entry: dict[str, Any]) -> str:
    return f"rank {entry['rank_correlation']:.2f}\nSSIM {entry['ssim']:.2f}"


def _write_rows(
    folder: Path,
    labels: list[str],
    photos: list[Path],
    layers: list[str],
    entries: dict[str, list[dict[str, Any]]],
) -> None:
    write_csv(
        folder / "results.csv",
        [
            {
                "photo": photo.name,
                "label": label,
                "layer": layer,
                "rank_correlation": entry["rank_correlation"],
                "ssim": entry["ssim"],
            }
            for layer in layers
            if layer in entries
            for photo, label, entry in zip(photos, labels, entries[layer], strict=True)
        ],
    )
