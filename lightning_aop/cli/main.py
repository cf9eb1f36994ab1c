"""The `lightning-aop` command: its sub-commands, the LightningCLI among them, and its errors."""

import json
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from jsonargparse import ArgumentParser, Namespace
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from lightning_aop._version import __version__
from lightning_aop.cli.benchmark import benchmark, benchmark_parser
from lightning_aop.cli.compare import compare, compare_parser
from lightning_aop.cli.configs import shipped_configs, with_shipped_configs
from lightning_aop.cli.cross_deletion import cross_deletion, cross_deletion_parser
from lightning_aop.cli.curves import curves, curves_parser
from lightning_aop.cli.errors import CommandError
from lightning_aop.cli.explain import explain, explain_parser
from lightning_aop.cli.report import report, report_parser
from lightning_aop.cli.sanity_check import sanity_check, sanity_check_parser
from lightning_aop.cli.table import table as benchmark_table
from lightning_aop.cli.table import table_parser
from lightning_aop.coco import CocoClassification, MultilabelClassifier
from lightning_aop.coco.predictions import PredictionWriter
from lightning_aop.experiments.pointing_game import Rules, details, name_of, play, table
from lightning_aop.methods.aop import AOP
from lightning_aop.methods.names import METHODS, MethodName
from lightning_aop.scores import sigmoid
from lightning_aop.types import SaliencyMethod

DESCRIPTION = """\
See what a PyTorch Lightning model looks at while it trains.

fit, validate, test, predict and pointing-game work on a multilabel classifier and a folder in COCO's
format; each takes --config FILE or the name of a configuration that comes with the package
({configs}), and options that override it. `lightning-aop COMMAND --help` lists them.
"""


# What Lightning warns of, and what is meant or none of the user's business.
_MEANT = (
    ".*in eval mode at the start of training",
    ".*LeafSpec",
    ".*does not have many workers",
    ".*replicates",  # the data module's blank images take the place of repeated ones
    ".*sync_dist=True",  # every process explains the same probe
    "The dirpath has changed",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["explain"]:
            return explain(explain_parser().parse_args(words[1:]))
        if words[:1] == ["compare"]:
            return compare(compare_parser().parse_args(with_shipped_configs(words[1:])))
        if words[:1] == ["cross-deletion"]:
            options = cross_deletion_parser().parse_args(with_shipped_configs(words[1:]))
            return cross_deletion(options)
        if words[:1] == ["sanity-check"]:
            return sanity_check(sanity_check_parser().parse_args(words[1:]))
        if words[:1] == ["report"]:
            return report(report_parser().parse_args(words[1:]))
        if words[:1] == ["table"]:
            return benchmark_table(table_parser().parse_args(words[1:]))
        if words[:1] == ["curves"]:
            return curves(curves_parser().parse_args(words[1:]))
        if words[:1] == ["demo"]:
            return _demo(_demo_parser().parse_args(words[1:]))
        for message in _MEANT:
            warnings.filterwarnings("ignore", message)
        try:
            if words[:1] == ["benchmark"]:
                return benchmark(words[1:])
            CommandLine(with_shipped_configs(words))
        finally:
            # Gloo's threads may still hold tensors when the interpreter ends, which then aborts.
            if dist.is_available() and dist.is_initialized():
                dist.destroy_process_group()
    except CommandError as error:
        print(f"lightning-aop: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lightning-aop: stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if not _is_ours(error):
            raise
        print(f"lightning-aop: {_message(error)}", file=sys.stderr)
        return 1
    return 0


class Trainer(pl.Trainer):
    """Lightning's trainer, with one more thing to do."""

    def pointing_game(
        self,
        model: MultilabelClassifier,
        datamodule: CocoClassification,
        ckpt_path: str | None = None,
        weights_only: bool | None = True,
        method: MethodName | SaliencyMethod | list[MethodName | SaliencyMethod] = "fast_sigcam",
        rules: Rules = Rules(),  # noqa: B008
        output: Path = Path("pointing_game"),
    ) -> None:
        """Play the pointing game: does the heat of a class lie on its objects?

        A run that was stopped goes on where it was when it is started again. Writes a table and
        the figures of each class to `output`.

        Args:
            model: what is explained.
            datamodule: its validation split is played on.
            ckpt_path: the checkpoint of the trained model.
            weights_only: load nothing but tensors and plain values from it.
            method: how to explain: a name, a class with its arguments, or a list of these. By name,
                the methods have the paper's settings for COCO.
            rules: what is counted.
            output: the folder of the results.
        """
        datamodule.prepare_data()
        datamodule.setup("validate")
        assert ckpt_path is not None, "seen to by the command line"
        if method == []:
            raise CommandError("pointing-game: no method is named; name one: --method sigcam")
        checkpoint = torch.load(ckpt_path, map_location="cpu", weights_only=weights_only)
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
        data = datamodule.dataset("val")
        model.check_classes(data.classes)
        results = []
        for chosen in method if isinstance(method, list) else [method]:
            name = chosen if isinstance(chosen, str) else name_of(chosen)
            way = coco_method(chosen) if isinstance(chosen, str) else chosen
            workers = datamodule.num_workers
            results.append(play(self, model, data, way, name, output, rules, workers))
            if self.is_global_zero:
                text = table(results, rules.tolerances)
                (output / "table.md").write_text(text + "\n")
                every = [details(result, rules.tolerances) for result in results]
                (output / "results.json").write_text(json.dumps(every, indent=1))
        datamodule.teardown("validate")
        if self.is_global_zero:
            print(f"\n{text}\n\nwrote {output / 'table.md'} and {output / 'results.json'}")


# What the subcommand is called, beside what Python allows.
setattr(Trainer, "pointing-game", Trainer.pointing_game)


def coco_method(name: MethodName) -> SaliencyMethod:
    """Return a method with the paper's settings for COCO: θ = 0.6, λ = 0.25, a sigmoid score."""
    method = METHODS[name](None, sigmoid)
    if name in ("sigcam", "gradcam+igos", "gradcam+emp"):
        assert isinstance(method, AOP)
        return replace(method, threshold=0.6, scale=0.25)
    return method


class SaveConfig(SaveConfigCallback):
    """Keeps the configuration of a training run with its logs, and never in the working folder."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write it, where there is a folder of the run's own."""
        if stage == "fit" and trainer.loggers:
            folder = trainer.log_dir
            if folder is not None and Path(folder).resolve() != Path.cwd():
                super().setup(trainer, pl_module, stage)


class CommandLine(LightningCLI):
    """fit, validate, test, predict and pointing-game; explain and demo are listed beside them."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        super().__init__(
            MultilabelClassifier,
            CocoClassification,
            trainer_class=Trainer,
            trainer_defaults={"max_epochs": 10},
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            parser_kwargs={
                "prog": "lightning-aop",
                "description": DESCRIPTION.format(configs=", ".join(shipped_configs())),
                "version": __version__,
            },
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Add the pointing game to what Lightning has."""
        return LightningCLI.subcommands() | {"pointing-game": {"model", "datamodule"}}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        commands: Any = parser._subcommands_action
        commands.add_subcommand(
            "explain", explain_parser(), help="Explain photos and draw the maps."
        )
        commands.add_subcommand(
            "compare", compare_parser(), help="Explain photos with many methods, side by side."
        )
        commands.add_subcommand(
            "cross-deletion",
            cross_deletion_parser(),
            help="Blur one class of a photo away, and watch another's score.",
        )
        commands.add_subcommand(
            "sanity-check",
            sanity_check_parser(),
            help="Randomise the network's layers, and see whether the maps change.",
        )
        commands.add_subcommand(
            "benchmark",
            benchmark_parser(),
            help="Judge methods on networks over many pictures: the paper's tables.",
        )
        commands.add_subcommand("table", table_parser(), help="Print what a benchmark has found.")
        commands.add_subcommand(
            "curves", curves_parser(), help="Draw the mean curves of a benchmark."
        )
        commands.add_subcommand(
            "demo", _demo_parser(), help="Watch a small network learn, offline."
        )

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if "weights_only" in self._subcommand_method_arguments[subcommand]:
            parser.set_defaults({"weights_only": True})
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the words given, not those of the process."""
        self.config = parser.parse_args(self.words)

    def _parse_ckpt_path(self) -> None:
        """Leave alone what the user has set: Lightning would let the checkpoint override it."""

    def instantiate_classes(self) -> None:
        """Make the network that the checkpoint holds, without looking for weights elsewhere."""
        command = str(self.subcommand)
        path = self.config[command].get("ckpt_path")
        if path is None and command in ("predict", "pointing-game"):
            raise CommandError(f"{command}: the head is untrained; name a checkpoint: --ckpt_path")
        if path is None or (path in ("best", "last") and command != "pointing-game"):
            super().instantiate_classes()
            return
        if not Path(path).is_file():
            raise CommandError(f"--ckpt_path {path}: no such file")
        saved = self.config
        if hasattr(self, "_dump_config"):  # Lightning 2.5 has done it before
            self._dump_config()
        self.config = saved.clone()
        options = self.config[command].model
        network = torch.load(path, map_location="cpu", weights_only=True).get(
            "hyper_parameters", {}
        )
        for key in {"backbone", "num_classes"} & set(network):
            options[key] = network[key]
        options.weights = None
        super().instantiate_classes()
        self.config = saved
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SaveConfig):
                callback.config = saved[command]

    def after_fit(self) -> None:
        """Say where things are."""
        if not self.trainer.is_global_zero:
            return
        checkpoints = [c.best_model_path for c in self.trainer.checkpoint_callbacks]  # type: ignore[attr-defined]
        print(f"\ncheckpoint   {', '.join(filter(None, checkpoints)) or 'none'}")
        # Not trainer.log_dir, which every process would have to ask for.
        folders = [getattr(logger, "root_dir", None) for logger in self.trainer.loggers]
        if folder := next(filter(None, folders), None):
            print(f"TensorBoard  tensorboard --logdir {folder}")

    def before_predict(self) -> None:
        """Write the predictions to a file."""
        self.trainer.callbacks.append(PredictionWriter())  # type: ignore[attr-defined]


def _demo_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="lightning-aop demo",
        description="Train a small multilabel network on generated pictures, with an "
        "ExplanationMonitor attached, and say where to look. About a minute on two CPU cores.",
    )
    parser.add_argument("--root", type=Path, default=Path("demo_run"), help="where to write")
    return parser


def _demo(options: Namespace) -> int:
    from lightning_aop.cli.demo import run

    run(options.root)
    return 0


# --------------------------------------------------------------------------------------------------
# what the user can mend


def _is_ours(error: BaseException) -> bool:
    """Tell an error that this package raised on purpose from a bug, whose traceback is needed."""
    frames = traceback.extract_tb(error.__traceback__)
    here = str(Path(__file__).parents[1])
    in_worker = "DataLoader worker process" in str(error) and "ImageError" in str(error)
    return in_worker or (bool(frames) and frames[-1].filename.startswith(here))


def _message(error: BaseException) -> str:
    text = str(error)
    # A worker's error comes with its traceback, the error itself last.
    return (
        text.strip().splitlines()[-1].split("Error: ", 1)[-1] if "worker process" in text else text
    )
