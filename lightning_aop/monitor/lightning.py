"""What the package needs of Lightning: `pytorch_lightning`, `lightning.pytorch`, or both.

Both have the same classes, and neither takes the other's for its own: a Trainer wants its own kind of
callback where one is given without a list around it, and in a configuration. So a `Callback` here is
one of every Lightning that has been imported. None is imported beside the user's: the last to be
imported would take over the messages of both, also when `logging` was told to leave the other's out.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

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
    from pytorch_lightning.utilities import rank_zero_warn
else:
    LightningModule = Trainer = Any  # of any Lightning
    rank_zero_warn = _in_use()[0].utilities.rank_zero_warn  # the same function in all

    def _bases() -> tuple[type, ...]:
        return tuple(lightning.Callback for lightning in _in_use())

    class Callback(*_bases()):
        """A callback of every Lightning that has been imported."""

        def __new__(cls, *args: Any, **kwargs: Any) -> "Callback":
            """Take in a Lightning that was imported since."""
            if (bases := _bases()) != Callback.__bases__:
                Callback.__bases__ = bases
            return super().__new__(cls)


def misconfiguration(trainer: Trainer, message: str) -> Exception:
    """Return the error by which the trainer's own Lightning refuses settings."""
    lightnings = _in_use()
    own = next((each for each in lightnings if isinstance(trainer, each.Trainer)), lightnings[0])
    error: Exception = own.utilities.exceptions.MisconfigurationException(message)
    return error


__all__ = ["Callback", "LightningModule", "Trainer", "misconfiguration", "rank_zero_warn"]
