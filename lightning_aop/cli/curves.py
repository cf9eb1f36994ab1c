"""`lightning-aop curves`: the mean curves of a benchmark as a picture (the paper's Figure 4)."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from lightning_aop.cli.errors import CommandError
from lightning_aop.experiments.curves import draw, mean_curves
from lightning_aop.experiments.results import Manifest


def curves_parser() -> ArgumentParser:
    """Return the options of `lightning-aop curves`."""
    parser = ArgumentParser(
        prog="lightning-aop curves",
        description="Draw the mean deletion and insertion curves of a benchmark, a column for each "
        "network, with 95 % bands of the mean; also while it runs.",
    )
    add = parser.add_argument
    add("run", type=Path, help="the output folder of a benchmark")
    add("--images", default="all", choices=["all", "correct"], help="what the means are over")
    add(
        "-o",
        "--output",
        type=Path | None,
        help="PNG, PDF or SVG; default: curves.png in the folder",
    )
    return parser


def curves(options: Namespace) -> int:
    """Draw the curves."""
    found = mean_curves(options.run, options.images)
    if not found:
        raise CommandError(f"{options.run}: there are no curves yet")
    manifest = Manifest.read(options.run)
    assert manifest is not None
    methods = list(dict.fromkeys(name for own in manifest.methods.values() for name in own))
    path = options.output or options.run / "curves.png"
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise CommandError(f"--output {path}: must end in .png, .pdf or .svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(found, list(manifest.folders), methods, manifest.reference()).savefig(path)
    print(f"wrote {path}")
    return 0
