"""`lightning-aop sanity-check`: do a method's maps change when the network forgets what it learnt?"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from lightning_aop.cli.photos import load, photo_options, photos_first, progress, read_pairs
from lightning_aop.cli.store import MapStore, make_folder, write_csv
from lightning_aop.errors import UserError
from lightning_aop.methods.names import make_method, method_list
from lightning_aop.metrics.randomization import parameter_randomization, weighted_layers
from lightning_aop.tables import formatted
from lightning_aop.view.png import write_png
from lightning_aop.view.table import map_table


def main(words: Sequence[str]) -> int:
    """Run the command on its words."""
    return sanity_check(sanity_check_parser().parse_args(photos_first(words[1:])))


def sanity_check_parser() -> ArgumentParser:
    """Return the options of `lightning-aop sanity-check`."""
    parser = ArgumentParser(
        prog="lightning-aop sanity-check",
        description="Give the layers of a network random weights, one after the other from the output "
        "to the input, and compare the maps with those of the trained network: a map that stays "
        "what it was does not show what the network has learnt (Adebayo et al. 2018). Writes a "
        "picture and a CSV file; run it again after it was stopped, and it goes on.",
    )
    photo_options(parser)
    add = parser.add_argument
    add("--method", default="gradcam", help=f"what is put to the test: {method_list()}")
    add(
        "--mode",
        default="cascading",
        choices=["cascading", "independent"],
        help="randomise each layer on top of those before it, or alone",
    )
    add("--layers", nargs="+", help="these layers, in this order; default: all with weights")
    add("--seed", type=int, default=0, help="of the random weights")
    add("--cell", type=int, default=112, help="pixels of a map's longer side in the picture")
    add("-o", "--output", type=Path, default=Path("sanity_check"), help="the folder to write to")
    return parser


def sanity_check(options: Namespace) -> int:
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
