"""Published networks without their last layer: torchvision's and timm's, by name."""

import importlib
import re
import urllib.error
from pathlib import Path
from typing import Any, cast

import torch
import torchvision
from torch import Tensor, nn


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
        raise ValueError(
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
        raise FileNotFoundError(
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
        raise ValueError(
            f"weights {weights!r} of {name} are not published by torchvision; it has {known}, or "
            "name a local file"
        ) from error
    except (urllib.error.URLError, OSError) as error:
        raise OSError(
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
        raise ImportError(f"backbone timm/{name} needs timm: pip install timm") from error
    if weights not in (None, "DEFAULT"):
        name = f"{name.split('.')[0]}.{weights}"  # timm's tag, as in resnet50.a1_in1k
    try:
        return cast("nn.Module", timm.create_model(name, pretrained=weights is not None))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"backbone timm/{name}: {error} (timm.list_models())") from error
    except Exception as error:
        raise OSError(
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
        raise ValueError(f"weights {file}: no state_dict can be read from it ({error})") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"weights {file}: holds no state_dict of tensors")
    extra = ("AuxLogits.", "aux1.", "aux2.")
    own = network.state_dict()
    state = undotted(state)
    state = {k: v for k, v in state.items() if k in own or not k.startswith(extra)}
    missing, alien = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    head = [k for k in wrong if k.startswith(_head(network)[0] + ".")]
    if missing or alien or wrong != (head if any_head else []):
        first = next(iter([*missing, *alien, *wrong]))
        raise ValueError(
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
        raise ValueError(f"{type(network).__name__} has no linear or convolutional layer")
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
