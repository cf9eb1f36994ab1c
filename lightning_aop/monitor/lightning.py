"""What the package needs of Lightning: `pytorch_lightning`, `lightning.pytorch`, or both.

Both have the same classes, and neither takes the other's for its own: a Trainer wants its own kind of
callback where one is given without a list around it, and in a configuration. So a `Callback` here is
one of every Lightning that has been imported. None is imported beside the user's: the last to be
imported would take over the messages of both, also when `logging` was told to leave the other's out.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from tqdm import tqdm

from lightning_aop.model.isolation import device_of, in_float32, kept, undisturbed
from lightning_aop.monitor.explanation import Moment, MomentKind
from lightning_aop.monitor.facts import class_count, class_names
from lightning_aop.monitor.labels import ReadBatch, read_batch
from lightning_aop.monitor.probe import Drawn, ProbeSource, collect, source_of

_NAMES = ("pytorch_lightning", "lightning.pytorch")


def _in_use() -> list[Any]:
    """Return every Lightning that has been imported; import one where there is none."""
    imported = [sys.modules[name] for name in _NAMES if hasattr(sys.modules.get(name), "Trainer")]
    if imported:
        return imported
    try:
        return [import_module(_NAMES[0])]
    except ModuleNotFoundError:
        return [import_module(_NAMES[1])]


if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.utilities import rank_zero_only as _rank_zero_only
else:
    LightningModule = Trainer = Any  # of any Lightning
    _rank_zero_only = _in_use()[0].utilities.rank_zero_only  # the same function in all

    def _bases() -> tuple[type, ...]:
        return tuple(lightning.Callback for lightning in _in_use())

    class Callback(*_bases()):
        """A callback of every Lightning that has been imported."""

        def __new__(cls, *args: Any, **kwargs: Any) -> "Callback":
            """Take in a Lightning that was imported since."""
            if (bases := _bases()) != Callback.__bases__:
                Callback.__bases__ = bases
            return super().__new__(cls)


@_rank_zero_only
def warn(message: str) -> None:
    """Warn, in these words only: no bar around them, and no line of somebody's code."""
    own = warnings.formatwarning
    with tqdm.external_write_mode(file=sys.stderr):
        try:
            warnings.formatwarning = lambda message, *rest: f"{message}\n"
            warnings.warn(message, stacklevel=3)
        finally:
            warnings.formatwarning = own


@_rank_zero_only
def inform(message: str) -> None:
    """Say what is done, where Lightning says such things."""
    with tqdm.external_write_mode(file=sys.stderr):
        _in_use()[0].utilities.rank_zero_info(message)


def misconfiguration(trainer: Trainer, message: str) -> Exception:
    """Return the error by which the trainer's own Lightning refuses settings."""
    lightnings = _in_use()
    own = next((each for each in lightnings if isinstance(trainer, each.Trainer)), lightnings[0])
    error: Exception = own.utilities.exceptions.MisconfigurationException(message)
    return error


def moment_of(trainer: Trainer, kind: MomentKind) -> Moment:
    """Return where the training is."""
    epoch = trainer.current_epoch
    if kind == "end":
        epoch = max(epoch - 1, 0)  # Lightning has gone on to the one that will not be
    # What Lightning's own callbacks log at: of several optimizers' steps in a batch it counts one.
    step: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    if kind == "end" or (kind == "epoch" and trainer.training):
        step -= 1  # the batch is counted by then; Lightning's own values go to the one before, too
    if kind != "start":
        step = max(step, 1)  # a first epoch of a single batch ends at step 0, as training starts
    fitting = trainer.state.fn == "fit"
    title = "validation"
    if fitting:
        title = "before training" if kind == "start" else f"epoch {epoch} · step {step}"
    return Moment(kind, step, epoch, title, fitting)


def logs_folder(trainer: Trainer) -> Path:
    """Return where a logger has its files, as Lightning's ModelCheckpoint finds it."""
    directory: str | Path | None = None
    for logger in trainer.loggers:
        directory = getattr(logger, "log_dir", None)
        if directory is None and logger.save_dir is not None:
            directory = Path(logger.save_dir) / str(logger.name) / str(logger.version)
        if directory is not None:
            break
    return Path(directory or trainer.default_root_dir)


def wants_files(trainer: Trainer) -> bool:
    """Tell whether the trainer lets a run leave files."""
    return not (getattr(trainer, "fast_dev_run", False) or getattr(trainer, "barebones", False))


def unsupported(trainer: Trainer) -> str | None:
    """Return why the monitor can't work with this trainer, or None."""
    name = type(trainer.strategy).__name__
    if name in ("FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy"):
        return (
            f"{name} shards the weights over the processes, and a map needs all of them in each: use "
            "DDP or FSDP2 (ModelParallelStrategy), or leave the monitor out and explain a checkpoint "
            "by trainer.validate() on one device"
        )
    return None


@contextmanager
def precision_of(trainer: Trainer, module: LightningModule, full: bool) -> Iterator[None]:
    """Compute in the trainer's precision, or in float32 if `full`."""
    kind = device_of(module).type
    if full:
        with in_float32(module), torch.autocast(kind, enabled=False):
            yield
        return
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    dtype = mixed.get(str(trainer.precision))  # other precisions are the weights' own
    with torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
        yield


def validates(trainer: Trainer) -> bool:
    """Tell whether epochs of training have a validation: not without a batch to validate on."""
    known = trainer.val_dataloaders is not None
    return bool(trainer.enable_validation) and not (known and not sum(trainer.num_val_batches))


def loaders_of(trainer: Trainer) -> Any:
    """Return the loaders that the probe is taken from: those of validation, else of training."""
    validation = trainer.val_dataloaders
    if validation is None or (trainer.state.fn == "fit" and not validates(trainer)):
        return trainer.train_dataloader
    return validation


def draw(
    source: ProbeSource,
    read: ReadBatch | None,
    trainer: Trainer,
    module: LightningModule,
    names: Sequence[str] | None = None,
) -> Drawn:
    """Take the probe from its source, the way a validation batch would come to the model.

    `names` are those that the user gave the classes.
    """
    stage = trainer.state.stage
    try:
        # Hooks such as on_after_batch_transfer must not augment it as if it were for training.
        trainer.validating = True
        with undisturbed(module), torch.no_grad():
            found = collect(source, loaders_of(trainer))
            batch = trainer.precision_plugin.convert_input(found.batch)
            with _kept_hooks(getattr(trainer, "datamodule", None)):
                batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
                batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    finally:
        trainer.state.stage = stage
    given = [] if names is None else [{"class_names": list(names)}]
    sources = [*given, *fact_sources(source, trainer)]
    known = class_names(sources).value
    reading = read_batch(batch, found.limit, read, known, found.numbers).used_by(module)
    masks, origin = found.read_masks, found.origin
    return Drawn(reading, class_count(sources), found.limit, masks, given, known, origin)


def _kept_hooks(datamodule: Any) -> AbstractContextManager[None]:
    """Leave a DataModule as it was, where it has hooks of its own for batches."""
    hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    own = [getattr(type(datamodule), name, None) for name in hooks]
    roots = {hook.__module__.partition(".")[0] for hook in own if hook is not None}
    return kept(datamodule) if roots - {"lightning", "pytorch_lightning"} else nullcontext()


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch of any form with its tensors on a device."""
    # Not the LightningModule's hooks, which may ask for its trainer.
    return _in_use()[0].utilities.move_data_to_device(batch, device)


def fact_sources(source: ProbeSource, trainer: Trainer) -> list[Any]:
    """Return what may tell the names of classes and the normalisation, the likeliest first."""
    datasets = [source_of(each, loaders_of(trainer)) for each in (source, 1)]
    return [*datasets, getattr(trainer, "datamodule", None), trainer.lightning_module]


def data_name(source: ProbeSource, trainer: Trainer) -> str:
    """Return what the data is called, in code: its DataModule, or the dataset of the probe."""
    datasets = [source_of(each, loaders_of(trainer)) for each in (source, 1)]
    named = [each for each in (getattr(trainer, "datamodule", None), *datasets) if each is not None]
    return type(named[0]).__name__ if named else ""


def is_last(trainer: Trainer) -> bool:
    """Tell whether training is known to end with this batch: a stop by a callback isn't known yet."""
    if 0 < trainer.max_steps <= trainer.global_step:
        return True
    return bool(trainer.is_last_batch) and trainer.current_epoch + 1 == trainer.max_epochs


def watched(trainer: Trainer) -> dict[str, Literal["min", "max"]]:
    """Return the names of the values that callbacks and schedulers wait for, and which way is better."""
    callbacks = getattr(trainer, "callbacks")  # noqa: B009  # which its class does not declare
    waiting = [(each, each) for each in callbacks]
    waiting += [(each, each.scheduler) for each in trainer.lr_scheduler_configs]
    return {
        name: "max" if getattr(judge, "mode", None) == "max" else "min"
        for each, judge in waiting
        if isinstance(name := getattr(each, "monitor", None), str)
    }


def log_scalars(
    trainer: Trainer,
    module: LightningModule,
    scalars: dict[str, float],
    moment: Moment,
    warn: Callable[[str], None],
) -> None:
    """Log values so that loggers, checkpoints and other callbacks get them."""
    together = trainer.world_size > 1
    if moment.kind == "epoch":
        module.log_dict(scalars, on_step=False, on_epoch=True, batch_size=1, sync_dist=together)
        return
    # Lightning would drop what is logged at a step off its log_every_n_steps, and refuses to log before
    # and after training: the loggers get it directly, ModelCheckpoint by log_dict.
    if moment.kind == "step":
        module.log_dict(scalars, on_step=True, on_epoch=False, logger=False, sync_dist=together)
    for logger in trainer.loggers:
        try:
            logger.log_metrics(scalars, step=moment.step)
        except Exception as error:
            name = type(logger).__name__
            warn(f"could not log metrics to {name}. {type(error).__name__}: {error}")


__all__ = [
    "Callback",
    "LightningModule",
    "Trainer",
    "data_name",
    "draw",
    "inform",
    "is_last",
    "loaders_of",
    "log_scalars",
    "logs_folder",
    "misconfiguration",
    "moment_of",
    "precision_of",
    "to_device",
    "unsupported",
    "validates",
    "wants_files",
    "warn",
    "watched",
]
