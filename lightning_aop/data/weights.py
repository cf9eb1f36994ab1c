"""Files of weights as people have them: only their tensors are read, and no object in them is made."""

import importlib
import pickle
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lightning_aop.errors import InvalidValueError, MissingFileError, MissingPackageError

# Where the tensors are in what a training wrote, beside its optimizer; averaged ones come last.
_ENVELOPES = (
    *("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module"),
    *("ema", "model_ema", "state_dict_ema", "ema_state_dict", "params_ema", "shadow_params"),
)
_REMEDY = "save the network alone: torch.save(model.state_dict(), FILE)"
# What torch.compile and FSDP put between the names of a network's parts.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


_OTHERS = (
    (b"\x1f\x8b", "packed by gzip", "unpack it: gunzip FILE"),
    (b"\x89HDF", "HDF5, as Keras writes it", _REMEDY),
    (b"\x08", "ONNX", _REMEDY),
)


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
    content = read_content(file)
    classes = content.get("classes") if isinstance(content, dict) else None
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    tensors = _tensors(content, file)
    for wrapper in _WRAPPERS:
        tensors = {name.replace(wrapper, ""): tensor for name, tensor in tensors.items()}
    return Weights(file, tensors, cast("list[str]", classes) if named else None)


def read_content(file: Path) -> Any:
    """Return all that a file of PyTorch or safetensors holds but objects of other classes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it can't be read, in words for the user.
        ImportError: it is of safetensors, which is not installed.
    """
    if file.is_dir():
        raise InvalidValueError(
            f"weights {file}: it is a folder; name the file in it, such as model.safetensors"
        )
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
    if start.lstrip().startswith((b"{", b"[")):
        raise InvalidValueError(
            f"weights {file}: it is JSON, not the weights; name the file that holds the tensors"
        )
    if start.lstrip()[:1] == b"<":
        raise InvalidValueError(
            f"weights {file}: it is a web page, not the weights; download them again"
        )
    # The length of a header, and the header in JSON; whatever the file is called.
    if start[8:9] == b"{" or (file.suffix == ".safetensors" and start[:2] != b"PK"):
        return _safetensors(file)
    for mark, kind, remedy in _OTHERS:
        if start.startswith(mark):
            raise InvalidValueError(
                f"weights {file}: it is {kind}, not weights of PyTorch; {remedy}"
            )
    return _unpickled(file)


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
        return _plain(file)
    except pickle.UnpicklingError as error:
        refused = error
    except Exception as error:
        if "TorchScript" in str(error):
            raise InvalidValueError(
                f"weights {file}: it holds a TorchScript program, which is not run; {_REMEDY}"
            ) from error
        if "data.pkl" in str(error):
            raise InvalidValueError(
                f"weights {file}: it is an archive of PyTorch's without a state_dict, such as "
                f"torch.export.save writes; {_REMEDY}"
            ) from error
        if "not in a subdirectory" in str(error):
            raise InvalidValueError(
                f"weights {file}: it is a ZIP archive, or NumPy's .npz, not weights of PyTorch; unpack "
                f"it, or {_REMEDY}"
            ) from error
        raise InvalidValueError(
            f"weights {file}: it is no file of PyTorch's, or is cut short ({_first_line(error)}); copy "
            "or download it again"
        ) from error
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
    except Exception:
        # Files of PyTorch before 1.6 are not searched for classes, and text is no pickle at all.
        foreign = []
    for kind in (_LeftOut, _LeftOutDict) if foreign else ():
        # Each foreign name becomes a class of its own, so that a pickled model can be named.
        stand_ins: list[Any] = [
            (type(_shown(name.rpartition(".")[2]), (kind,), {}), name) for name in foreign
        ]
        try:
            with torch.serialization.safe_globals(stand_ins):
                return _plain(file)
        except Exception:
            continue
    what = (
        f"it holds {', '.join(map(_shown, foreign[:3]))}"
        if foreign
        else "it is not a file that PyTorch wrote"
    )
    raise InvalidValueError(f"weights {file}: {what}; {_REMEDY}") from refused


def _plain(file: Path) -> Any:
    # Of a name with the suffix of safetensors, torch would not look at the content.
    with file.open("rb") as opened:
        return torch.load(opened, map_location="cpu", weights_only=True)


def _shown(name: str) -> str:
    """Return a name that a damaged file may have filled with anything."""
    return "".join(letter if letter.isprintable() else "?" for letter in name[:80])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _tensors(content: Any, file: Path) -> dict[str, Tensor]:
    """Return the named tensors of a network in a file's content, those of an envelope first."""
    left_out: list[str] = []
    if found := _found(content, left_out, set()):
        return found
    if left_out:
        raise InvalidValueError(
            f"weights {file}: it holds a pickled object, {left_out[0]}, which could run any "
            f"code and is not loaded; {_REMEDY}"
        )
    if isinstance(content, dict) and any("optim" in str(k) or k == "param_groups" for k in content):
        raise InvalidValueError(
            f"weights {file}: it holds the state of an optimizer and no network; {_REMEDY}"
        )
    raise InvalidValueError(f"weights {file}: holds no state_dict of tensors; {_REMEDY}")


def _found(content: Any, left_out: list[str], seen: set[int]) -> dict[str, Tensor]:
    """Look for named tensors; note the classes of pickled objects where they could have been."""
    if isinstance(content, _LeftOut):
        left_out.append(type(content).__name__)
    if isinstance(content, (list, tuple)):  # the state, and how long it was trained
        content = {f"part {number}": part for number, part in enumerate(content[:8])}
    # A pickle may hold itself.
    if not isinstance(content, dict) or "param_groups" in content or id(content) in seen:
        return {}
    seen.add(id(content))
    for key in _ENVELOPES:
        if found := _found(content.get(key), left_out, seen):
            return found
    own = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    # An envelope of another name: what the training kept for itself is none.
    inner = [
        _found(value, left_out, seen)
        for key, value in content.items()
        if isinstance(value, dict) and not _TRAINING.search(str(key))
    ]
    return max((own, *inner), key=len)


_TRAINING = re.compile("optim|sched|scaler|rng|callbacks|loops|hparams|hyper_parameters|config")
