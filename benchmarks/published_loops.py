"""RISE and I-GOS as their authors run them, written out slowly from the papers.

They are what `peers.py` compares our batched, chunked versions with. Random numbers are drawn from the
same generator in the same order as ours, so that the maps can be compared too. Where it isn't known
how often the authors evaluate the model, the lower number is taken: these loops need as many
evaluations as ours. In float64 the maps agree to rounding; in float32 rounding decides some of I-GOS's
line searches near their end, where a step hardly changes the loss.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur


@torch.no_grad()
def rise(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    masks: int,
    cells: int = 7,
    probability: float = 0.5,
    seed: int = 0,
    batch: int = 100,
) -> Tensor:
    """Return the maps [B, H, W], not normalised (Petsiuk, Das and Saenko 2018, Eq. 6).

    All masks are made and held before the first image is seen, and of each image all masked copies;
    these go through the model in batches of 100.
    """
    height, width = images.shape[2:]
    tall, wide = -(-height // cells), -(-width // cells)
    generator = torch.Generator(images.device).manual_seed(seed)
    draw: dict[str, Any] = {"generator": generator, "device": images.device}
    grids = torch.rand(masks, cells, cells, **draw) < probability
    tops = torch.randint(tall, (masks,), **draw)
    lefts = torch.randint(wide, (masks,), **draw)
    made = torch.empty(masks, 1, height, width, device=images.device)
    size = ((cells + 1) * tall, (cells + 1) * wide)
    for n in range(masks):
        large = F.interpolate(grids[n][None, None].float(), size, mode="bilinear")
        top, left = int(tops[n]), int(lefts[n])
        made[n] = large[0, :, top : top + height, left : left + width]
    maps = []
    for image, target in zip(images, targets, strict=True):
        stack = made * image
        scores = torch.cat([_probabilities(model(part)) for part in stack.split(batch)])
        weights = scores[:, target]
        with torch.autocast(images.device.type, enabled=False):
            maps.append((weights @ made.flatten(1)).view(height, width) / masks / probability)
    return torch.stack(maps)


def igos(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    iterations: int = 15,
    samples: int = 20,
    side: int = 28,
    l1: float = 1.0,
    tv: float = 20.0,
    noise: float = 0.012,
    seed: int = 0,
) -> Tensor:
    """Return 1 − M [B, H, W] of the last iterate, from M = 1 (Qi, Khorram and Li 2020).

    One image after the other. The integrated gradient is one batch of noisy masked copies, each
    masked by a share of the mask; each trial of the line search is one forward of one image. `noise`
    is a share of each channel's span.
    """
    one = partial(_igos, model, iterations=iterations, samples=samples, side=side)
    pairs = zip(images.split(1), targets.tolist(), strict=True)
    return torch.cat([one(x, t, l1=l1, tv=tv, noise=noise, seed=seed) for x, t in pairs])


def _igos(
    model: nn.Module,
    image: Tensor,
    target: int,
    iterations: int,
    samples: int,
    side: int,
    l1: float,
    tv: float,
    noise: float,
    seed: int,
) -> Tensor:
    height, width = image.shape[2:]
    generator = torch.Generator(image.device).manual_seed(seed)
    blurred: Tensor = gaussian_blur(image, [51, 51], [50.0, 50.0])
    spread = noise * (image.amax((2, 3), True) - image.amin((2, 3), True))

    def enlarged(mask: Tensor) -> Tensor:
        return F.interpolate(mask, (height, width), mode="bilinear", align_corners=True)

    def score(pixels: Tensor) -> Tensor:
        return _probabilities(model(pixels))[:, target]

    def masked(keep: Tensor) -> Tensor:
        return image * keep + blurred * (1 - keep)

    def price(mask: Tensor) -> Tensor:
        rows, columns = mask[:, :, 1:] - mask[:, :, :-1], mask[..., 1:] - mask[..., :-1]
        smoothness = rows.square().mean() + columns.square().mean()
        return l1 * (1 - mask).abs().mean() + tv * smoothness

    @torch.no_grad()
    def value(mask: Tensor) -> float:
        return float(score(masked(enlarged(mask))))

    mask = torch.ones(1, 1, side, side, device=image.device)
    now = first = value(mask)
    for iteration in range(iterations):
        moved = abs(first - now)
        if iteration == iterations // 2 and moved <= 1e-3:
            l1 /= 10
        elif iteration == int(iterations / 1.25) and moved <= 1e-2:
            l1 /= 5
        mask.requires_grad_()
        shares = torch.arange(1, samples + 1, device=image.device).view(-1, 1, 1, 1) / samples
        copies = masked(shares * enlarged(mask))
        draws = torch.randn(copies.shape, generator=generator, device=image.device)
        copies = copies + spread * draws
        regularisers = price(mask)
        (direction,) = torch.autograd.grad(regularisers + score(copies).mean(), mask)
        loss, mask = float(regularisers.detach()) + now, mask.detach()
        step, fall = 200.0, 1e-4 * float(direction.square().sum())
        while True:
            trial = (mask - step * direction).clamp(0, 1)
            now = value(trial)
            if float(price(trial)) + now <= loss - step * fall or step < 1e-5:
                break
            step *= 0.2
        mask = trial
    return 1 - enlarged(mask)[:, 0]


def _probabilities(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1)
