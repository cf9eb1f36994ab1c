"""What the commands with a Trainer share: their parser, fewer warnings, an end of the process group."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch.distributed as dist
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.cli import LightningArgumentParser

from lightning_aop.cli.options import in_a_line, nearest_options
from lightning_aop.errors import UserError


class LightningParser(LightningArgumentParser):
    """A parser that says which option a mistyped one may mean, and in a line what a value must be."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message, and exit."""
        super().error(in_a_line(self, message) + nearest_options(self, message), ex)


class Trainer(pl.Trainer):
    """Lightning's trainer, which says in a line what it refuses of its settings."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise UserError(f"--trainer: {' '.join(str(error).split())}") from error


# What Lightning warns of, and what is meant or none of the user's business.
_MEANT = (
    ".*in eval mode at the start of training",
    ".*LeafSpec",
    ".*does not have many workers",
    ".*replicates",  # the data module's blank images take the place of repeated ones
    ".*sync_dist=True",  # every process explains the same probe
    "The dirpath has changed",
)


@contextmanager
def tidy_run() -> Iterator[None]:
    """Leave out the warnings that a run means to cause, and leave its process group at the end."""
    for message in _MEANT:
        warnings.filterwarnings("ignore", message)
    try:
        yield
    finally:
        # Gloo's threads may still hold tensors when the interpreter ends, which then aborts.
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
