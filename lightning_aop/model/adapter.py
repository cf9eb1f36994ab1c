"""Evaluate a user's model as images [B, C, H, W] to logits [B, K]."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_aop.checks import check_batch
from lightning_aop.errors import InvalidTypeError, InvalidValueError
from lightning_aop.model.isolation import device_of, undisturbed, unwrap
from lightning_aop.model.passes import pass_size
from lightning_aop.scores import Score, full_precision
from lightning_aop.types import Images, Targets

__all__ = ["Classifier", "explaining", "predict"]


@dataclass(frozen=True)
class Classifier:
    """The class scores F_c of a model, evaluated with its inputs checked and its outputs in float32.

    Made by `explaining`; `highest` is the largest target, known on the host, so that a class out of
    range is an error message and not a failed assertion on the device.
    """

    model: nn.Module
    highest: int

    def logits(self, images: Images) -> Float[Tensor, "b k"]:
        """Evaluate the model in its own dtype and return logits in float32 or wider."""
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)
        output = self.model(images if dtype is None else images.to(dtype))
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InvalidValueError(
                f"{type(self.model).__name__} must map images [B, C, H, W] to logits [B, K], got "
                f"{got} for {len(images)} images: wrap it in a module whose forward returns the "
                "logits"
            )
        if self.highest >= logits.shape[1]:
            raise InvalidValueError(
                f"targets must lie in 0..{logits.shape[1] - 1}, the classes of "
                f"{type(self.model).__name__}, got {self.highest}"
            )
        return full_precision(logits)

    def scores(self, images: Images, targets: Targets, score: Score) -> Float[Tensor, " b"]:
        """Return F_c of each image."""
        return score(self.logits(images), targets)


@contextmanager
def explaining(
    model: nn.Module, images: Images, targets: Targets, seed: int = 0
) -> Iterator[tuple[Classifier, Images, Targets]]:
    """Check the batch and open `undisturbed`; yield the classifier and the batch on its device.

    The yielded tensors are the caller's values, usable by autograd even where the caller's own were
    made in inference mode; the caller's tensors are never written.
    """
    check_batch(images, targets)
    if not callable(getattr(model, "forward", None)) or not isinstance(model, nn.Module):
        raise InvalidTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = unwrap(model)
    with undisturbed(model, seed):
        device = device_of(model)
        targets = targets.detach().clone().to(device)
        low, high = (int(value) for value in torch.stack(targets.aminmax()).tolist())
        if low < 0:
            raise InvalidValueError(f"targets must be class indices of 0 or more, got {low}")
        yield Classifier(model, high), full_precision(images.detach().clone().to(device)), targets


def predict(
    model: nn.Module, images: Images, eval_batch_size: int | None = None
) -> Float[Tensor, "b k"]:
    """Return the model's logits in eval mode, leaving it undisturbed."""
    anything = torch.zeros(len(images), dtype=torch.long, device=images.device)
    with explaining(model, images, anything) as (classifier, x, _), torch.no_grad():
        return torch.cat([classifier.logits(part) for part in x.split(pass_size(eval_batch_size))])
