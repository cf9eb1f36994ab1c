"""`lightning-aop table`: the results of a benchmark as a table."""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from lightning_aop.cli.options import Parser
from lightning_aop.errors import UserError


def main(words: Sequence[str]) -> int:
    """Run the command on its words."""
    return table(table_parser().parse_args(words[1:]))


def table_parser() -> ArgumentParser:
    """Return the options of `lightning-aop table`."""
    parser = Parser(
        prog="lightning-aop table",
        description="Print the results of a benchmark, also while it runs: the mean deletion, insertion "
        "and overall AUC of each method on each network with 95 % intervals (bootstrap over the "
        "images), the paired difference to a reference method, the paper's values where they are "
        "known, and what the maps cost.",
    )
    add = parser.add_argument
    add("run", type=Path, help="the output folder of a benchmark")
    add(
        "--format",
        default="text",
        choices=["text", "markdown", "latex", "csv"],
        help="of the table",
    )
    add("--images", default="all", choices=["all", "correct"], help="what the means are over")
    add(
        "--reference",
        type=str | None,
        help="compare with this method; default: sigcam, or the last that is no control",
    )
    add("--resamples", type=int, default=1000, help="of the bootstrap")
    add("--seed", type=int, default=0, help="of the bootstrap")
    add("--project", type=int | None, help="say how long this many images would take on one device")
    return parser


def table(options: Namespace) -> int:
    """Print the table."""
    # Imported here, so that --help does not wait for torch.
    from lightning_aop.experiments.tables import summary, written

    for name in ("resamples", "project"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name} {value}: must be 1 or more")
    found = summary(
        options.run,
        options.images,
        options.reference,
        options.resamples,
        options.seed,
        options.project,
    )
    print(written(found, options.format))
    return 0
