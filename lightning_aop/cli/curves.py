"""`lightning-aop curves`: the mean curves of a benchmark as a picture (the paper's Figure 4)."""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from lightning_aop.cli.options import Parser
from lightning_aop.errors import UserError


def main(words: Sequence[str]) -> int:
    """Run the command on its words."""
    return curves(curves_parser().parse_args(words[1:]))


def curves_parser() -> ArgumentParser:
    """Return the options of `lightning-aop curves`."""
    parser = Parser(
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
    # Imported here, so that --help does not wait for torch.
    from lightning_aop.cli.output import FIGURE, check_output, write_figure
    from lightning_aop.experiments.curves import draw, mean_curves
    from lightning_aop.experiments.results import Manifest

    if options.output:
        check_output(options.output, FIGURE)
    found = mean_curves(options.run, options.images)
    if not found:
        raise UserError(f"{options.run}: there are no curves yet")
    manifest = Manifest.read(options.run)
    assert manifest is not None
    methods = list(dict.fromkeys(name for own in manifest.methods.values() for name in own))
    path = options.output or options.run / "curves.png"
    write_figure(draw(found, list(manifest.folders), methods, manifest.reference()), path)
    print(f"wrote {path}")
    return 0
