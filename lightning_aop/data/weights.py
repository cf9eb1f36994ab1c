"""Files of weights as people have them: only their tensors are read, and no object in them is made."""

import importlib
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lightning_aop.errors import InvalidValueError, MissingFileError, MissingPackageError

# Where the tensors are in what a training wrote, beside its optimizer; averaged ones come last.
_ENVELOPES = (
    *("state_dict", "model_state_dict", "model", "net", "network", "weights", "params"),
    *("ema", "model_ema", "state_dict_ema", "ema_state_dict", "params_ema", "shadow_params"),
)
# What torch.compile and FSDP put between the names of a network's parts.
_REMEDY = "save the network alone: torch.save(model.state_dict(), FILE)"
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class Weights:
    """The tensors of a file.

    Attributes:
        file: for messages.
        tensors: by name.
        classes: the names of the classes, where the file has them.
    """

    file: Path
    tensors: dict[str, Tensor]
    classes: list[str] | None = None


def read_weights(file: Path) -> Weights:
    """Read a state_dict, alone or in a checkpoint, from a file of PyTorch or safetensors.

    Objects of other classes, such as those among the hyper-parameters of a checkpoint, are left out:
    the code of none is imported or run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no state_dict, in words for the user.
        ImportError: it is of safetensors, which is not installed.
    """
    if not file.is_file():
        raise MissingFileError(f"weights {file}: no such file")
    with file.open("rb") as opened:
        start = opened.read(64)
    if not start:
        raise InvalidValueError(f"weights {file}: the file is empty; copy or download it again")
    if start.startswith(b"version https://git-lfs"):
        raise InvalidValueError(
            f"weights {file}: it is a pointer of Git LFS, not the weights; run git lfs pull"
        )
    if start.lstrip()[:1] == b"<":
        raise InvalidValueError(
            f"weights {file}: it is a web page, not the weights; download them again"
        )
    content = _safetensors(file) if file.suffix == ".safetensors" else _unpickled(file)
    classes = content.get("classes") if isinstance(content, dict) else None
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    tensors = _tensors(content, file)
    for wrapper in _WRAPPERS:
        tensors = {name.replace(wrapper, ""): tensor for name, tensor in tensors.items()}
    return Weights(file, tensors, cast("list[str]", classes) if named else None)


def _safetensors(file: Path) -> Any:
    try:
        tool = importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise MissingPackageError(
            f"weights {file} need safetensors: pip install safetensors"
        ) from error
    try:
        return tool.load_file(file)
    except Exception as error:
        raise InvalidValueError(
            f"weights {file}: they can't be read as safetensors ({error}); the file may be cut short: "
            "copy or download it again"
        ) from error


class _LeftOut:
    """Stands for an object of a class that is not imported: takes its state, and forgets it."""

    def __init__(self, *_: object) -> None:
        """Take what the class would have been called with."""

    def __setstate__(self, state: object) -> None:
        """Forget the state."""


class _LeftOutDict:
    """Stands for a kind of dictionary, which the unpickler fills only as an OrderedDict."""

    def __new__(cls, *_: object) -> Any:
        """Return an empty dictionary."""
        return OrderedDict()


def _unpickled(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = error
    except Exception as error:
        if "TorchScript" in str(error):
            raise InvalidValueError(
                f"weights {file}: it holds a TorchScript program, which is not run; {_REMEDY}"
            ) from error
        raise InvalidValueError(
            f"weights {file}: it is no file of PyTorch's, or is cut short ({_first_line(error)}); copy "
            "or download it again"
        ) from error
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:
        # Files of PyTorch before 1.6 are not searched for classes, and text is no pickle at all.
        foreign = []
    for kind in (_LeftOut, _LeftOutDict) if foreign else ():
        # Each foreign name becomes a class of its own, so that a pickled model can be named.
        stand_ins: list[Any] = [
            (type(name.rpartition(".")[2], (kind,), {}), name) for name in foreign
        ]
        try:
            with torch.serialization.safe_globals(stand_ins):
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception:
            continue
    what = (
        f"it holds {', '.join(foreign[:3])}" if foreign else "it is not a file that PyTorch wrote"
    )
    raise InvalidValueError(f"weights {file}: {what}; {_REMEDY}") from refused


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _tensors(content: Any, file: Path) -> dict[str, Tensor]:
    """Return the named tensors that are the least deep in a file's content."""
    if isinstance(content, _LeftOut):
        raise InvalidValueError(
            f"weights {file}: it holds a pickled object, {type(content).__name__}, which could run any "
            f"code and is not loaded; {_REMEDY}"
        )
    if isinstance(content, dict):
        for key in _ENVELOPES:
            inner = content.get(key)
            if isinstance(inner, (dict, _LeftOut)) and inner:
                return _tensors(inner, file)
        found = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
        if found:
            return found
        if "param_groups" in content or "optimizer" in content or "optimizer_state_dict" in content:
            raise InvalidValueError(
                f"weights {file}: it holds the state of an optimizer and no network; {_REMEDY}"
            )
    raise InvalidValueError(f"weights {file}: holds no state_dict of tensors; {_REMEDY}")
