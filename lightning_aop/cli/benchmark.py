"""`lightning-aop benchmark`: many methods on networks over many images (Tables 1 and 2)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser

from lightning_aop.cli.configs import resolved, shipped_configs
from lightning_aop.cli.store import make_folder
from lightning_aop.cli.trainer import LightningParser, Trainer, tidy_run
from lightning_aop.errors import UserError
from lightning_aop.experiments import Network, Pictures, Rules, run
from lightning_aop.experiments.tables import summary, written
from lightning_aop.methods.names import MethodName
from lightning_aop.types import SaliencyMethod


def main(words: Sequence[str]) -> int:
    """Run the command on its words."""
    with tidy_run():
        return benchmark(words[1:])


def benchmark_parser() -> LightningArgumentParser:
    """Return the options of `lightning-aop benchmark`."""
    shipped = (Path(resolved(name)) for name in shipped_configs("benchmark"))
    # The others are for other commands.
    known = ", ".join(path.stem for path in shipped if "\nnetworks:" in path.read_text())
    parser = LightningParser(
        prog="lightning-aop benchmark",
        usage="lightning-aop benchmark CONFIG --data.root FOLDER [options]",
        description="Explain images with many methods on many networks, run deletion and insertion, "
        "and keep the values of each image. CONFIG is a file or the name of a configuration that "
        f"comes with the package ({known}); options override it. Run it again after it was stopped, "
        "with more processes, images or methods, and it goes on. `lightning-aop table FOLDER` "
        "prints the table, also while it runs.",
    )
    parser.add_argument("--config", action="config", help="or the first word, without --config")
    parser.add_argument("--output", type=Path, required=True, help="the folder of the results")
    parser.add_argument("--networks", type=dict[str, Network], help="what is explained, by name")
    parser.add_argument(
        "--methods",
        type=dict[str, MethodName | SaliencyMethod] | list[MethodName],
        help="how: methods by name, or classes with their arguments, under names for the table",
    )
    parser.add_class_arguments(Pictures, "data")
    parser.add_class_arguments(Rules, "rules")
    parser.add_argument(
        "--paper",
        type=Literal["table1", "table2"] | None,
        help="the table of the paper whose values are shown beside",
    )
    parser.add_class_arguments(Trainer, "trainer", fail_untyped=False)
    parser.set_defaults(
        {
            "trainer.logger": False,
            "trainer.enable_checkpointing": False,
            "trainer.enable_model_summary": False,
        }
    )
    return parser


def benchmark(words: Sequence[str]) -> int:
    """Run what the words ask for, and print the table."""
    if words and not words[0].startswith("-"):
        words = ["--config", resolved(words[0], "benchmark"), *words[1:]]
    parser = benchmark_parser()
    options = _instantiated(parser, words)
    methods = options.methods
    if isinstance(methods, list):
        methods = {name: name for name in methods}
    if not options.networks or not methods:
        raise UserError("benchmark: name networks and methods, in a configuration or as options")
    make_folder(options.output)
    zero = options.trainer.is_global_zero
    run(
        options.trainer,
        options.networks,
        methods,
        options.data,
        options.rules,
        options.output,
        options.paper,
        tell=lambda text: print(text, flush=True) if zero else None,
    )
    if not zero:
        return 0
    table = summary(options.output)
    print(f"\n{written(table)}\n\nlightning-aop table {options.output} prints it again")
    return 0 if any(row.images for row in table.rows) else 1


def _instantiated(parser: LightningArgumentParser, words: Sequence[str]) -> Namespace:
    config = parser.parse_args(list(words))
    # The older name, which newer versions warn of.
    make = getattr(parser, "instantiate", None) or parser.instantiate_classes
    made: Namespace = make(config)
    return made
