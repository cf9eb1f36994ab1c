"""`lightning-aop fit`, `validate`, `test`, `predict` and `pointing-game`, by LightningCLI."""

import inspect
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from lightning_aop.cli.configs import shipped_configs, with_shipped_configs
from lightning_aop.cli.pointing_game import Trainer
from lightning_aop.cli.trainer import LightningParser, tidy_run
from lightning_aop.coco import CocoClassification, MultilabelClassifier
from lightning_aop.coco.predictions import PredictionWriter
from lightning_aop.data.weights import read_content
from lightning_aop.errors import UserError, did_you_mean_file


def main(words: Sequence[str]) -> int:
    """Run the command that the first word names."""
    with tidy_run():
        CommandLine(with_shipped_configs(words))
    return 0


class SaveConfig(SaveConfigCallback):
    """Keeps the configuration of a training run with its logs, and never in the working folder."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write it, where there is a folder of the run's own."""
        if stage == "fit" and trainer.loggers:
            folder = trainer.log_dir
            if folder is not None and Path(folder).resolve() != Path.cwd():
                super().setup(trainer, pl_module, stage)


class CommandLine(LightningCLI):
    """The parsers of fit, validate, test, predict and pointing-game, and what they run."""

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
                "description": f"--config takes a file or one of {', '.join(shipped_configs())}.",
            },
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Add the pointing game to what Lightning has."""
        known = LightningCLI.subcommands() | {"pointing-game": {"model", "datamodule"}}
        return {command: left_out | {"weights_only"} for command, left_out in known.items()}

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        # Lightning 2.5.0 takes no class of parsers.
        parser.__class__ = LightningParser
        # Not the names of all settings above the one line that says what is wrong.
        parser.usage = f"lightning-aop {subcommand} [options]"
        return parser

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Let no option load the objects that a checkpoint holds, which could run any code."""
        options: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        takes = inspect.signature(getattr(Trainer, subcommand)).parameters
        return options | ({"weights_only": True} if "weights_only" in takes else {})

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except pickle.UnpicklingError as error:
            path = self.config[subcommand].get("ckpt_path")
            raise UserError(
                f"--ckpt_path {path}: it holds objects of other classes, which are not loaded; begin "
                f"anew from its tensors alone: --model.weights {path}"
            ) from error

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the words given, not those of the process."""
        self.config = parser.parse_args(self.words)

    def _parse_ckpt_path(self) -> None:
        """Leave alone what the user has set: Lightning would let the checkpoint override it."""

    def instantiate_classes(self) -> None:
        """Make the network that the checkpoint holds, without looking for weights elsewhere."""
        command = str(self.subcommand)
        self._check_root(self.config[command].data)
        path = self.config[command].get("ckpt_path")
        if path is None and command in ("predict", "pointing-game"):
            raise UserError(f"{command}: the head is untrained; name a checkpoint: --ckpt_path")
        if path is None or (path in ("best", "last") and command != "pointing-game"):
            super().instantiate_classes()
            return
        if not Path(path).is_file():
            raise UserError(f"--ckpt_path {path}: no such file{did_you_mean_file(Path(path))}")
        saved = self.config
        if hasattr(self, "_dump_config"):  # Lightning 2.5 has done it before
            self._dump_config()
        self.config = saved.clone()
        options = self.config[command].model
        content = read_content(Path(path))
        if not isinstance(content, dict) or "pytorch-lightning_version" not in content:
            raise UserError(
                f"--ckpt_path {path}: it is no checkpoint of fit; of weights alone begin anew, with "
                f"--model.weights {path}"
            )
        network = content.get("hyper_parameters")
        network = network if isinstance(network, dict) else {}
        for key in {"backbone", "num_classes"} & set(network):
            options[key] = network[key]
        options.weights = None
        super().instantiate_classes()
        self.config = saved
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SaveConfig):
                callback.config = saved[command]

    @staticmethod
    def _check_root(data: Namespace) -> None:
        """Look for the images before the network's weights are downloaded."""
        if data.root is None and data.annotations is None:
            raise UserError(
                "no data are named: give a folder, --data.root DIR, or one file with its images, "
                "--data.annotations FILE --data.images DIR"
            )
        if data.root is not None and data.shapes is None:
            root = Path(data.root).expanduser()
            if not root.is_dir():
                raise UserError(
                    f"--data.root {root}: no such folder; give one in COCO's layout, with train2017/, "
                    f"val2017/ and annotations/{did_you_mean_file(root)}"
                )
        if data.annotations is not None and not Path(data.annotations).expanduser().is_file():
            raise UserError(f"--data.annotations {data.annotations}: no such file")
        if data.images is not None and not Path(data.images).expanduser().is_dir():
            raise UserError(f"--data.images {data.images}: no such folder")

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
