"""The published algorithms as plain loops over one image at a time, to compare the package with."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ScoreOf = Callable[[Tensor], float]


def enlarge(mask: Tensor, height: int, width: int) -> Tensor:
    """Bilinear enlargement with aligned corners, one output pixel after the other."""
    rows, columns = mask.shape
    out = torch.zeros(height, width, dtype=mask.dtype)
    for i in range(height):
        for j in range(width):
            y, x = i * (rows - 1) / (height - 1), j * (columns - 1) / (width - 1)
            top, left = min(int(y), rows - 2), min(int(x), columns - 2)
            dy, dx = y - top, x - left
            out[i, j] = (
                mask[top, left] * (1 - dy) * (1 - dx)
                + mask[top, left + 1] * (1 - dy) * dx
                + mask[top + 1, left] * dy * (1 - dx)
                + mask[top + 1, left + 1] * dy * dx
            )
    return out


def igos(
    model: nn.Module,
    image: Tensor,
    target: int,
    start: Tensor,
    blurred: Callable[[int], Tensor],
    noises: list[Tensor],
    l1: float,
    tv: float,
    samples: int,
) -> tuple[Tensor, list[float], int]:
    """I-GOS on one image [C, H, W]: the last mask, the loss of each iterate, the trials."""
    iterations = len(noises)
    height, width = image.shape[1:]

    def up(mask: Tensor) -> Tensor:
        return F.interpolate(
            mask[None, None], (height, width), mode="bilinear", align_corners=True
        )[0, 0]

    def score(picture: Tensor) -> Tensor:
        return torch.softmax(model(picture[None]), dim=1)[0, target]

    def regularisers(mask: Tensor, weight: float) -> Tensor:
        variation = (mask[1:] - mask[:-1]).pow(2).mean() + (mask[:, 1:] - mask[:, :-1]).pow(
            2
        ).mean()
        return weight * (1 - mask).abs().mean() + tv * variation

    mask, trials, losses, first = start.clone(), 0, [], 0.0
    for iteration in range(iterations):
        baseline = blurred(iteration)

        def perturbed(mask: Tensor, baseline: Tensor = baseline) -> Tensor:
            return image * up(mask) + baseline * (1 - up(mask))

        with torch.no_grad():
            now = float(score(perturbed(mask)))
        if iteration == 0:
            first = now
        if iteration == iterations // 2 and iteration and abs(first - now) <= 1e-3:
            l1 /= 10
        elif iteration == int(iterations / 1.25) and iteration and abs(first - now) <= 1e-2:
            l1 /= 5
        leaf = mask.clone().requires_grad_()
        total = regularisers(leaf, l1)
        for s in range(1, samples + 1):
            total = (
                total + score(perturbed(s / samples * leaf) + noises[iteration][s - 1]) / samples
            )
        (direction,) = torch.autograd.grad(total, leaf)
        with torch.no_grad():
            loss = float(regularisers(mask, l1)) + now
            losses.append(loss)
            step = 200.0
            while True:
                trial = (mask - step * direction).clamp(0, 1)
                trials += 1
                value = float(regularisers(trial, l1) + score(perturbed(trial)))
                enough = value <= loss - 1e-4 * step * float(direction.pow(2).sum())
                if enough or step < 1e-5:
                    break
                step *= 0.2
            mask = trial
    return mask, losses, trials


def bilateral_mask(
    model: nn.Module,
    image: Tensor,
    baseline: Tensor,
    target: int,
    start: Tensor,
    points: list[tuple[float, float]],
    lr: float,
    l1: float,
    tv: float,
) -> Tensor:
    """The two-sided mask on one image, with Adam written out."""
    height, width = image.shape[1:]
    with torch.no_grad():
        whole = max(float(torch.softmax(model(image[None]), dim=1)[0, target]), 0.05)
    saliency = start.clone()
    mean, variance = torch.zeros_like(start), torch.zeros_like(start)
    for number, (a, b) in enumerate(points, start=1):
        leaf = saliency.clone().requires_grad_()
        up = F.interpolate(leaf[None, None], (height, width), mode="bilinear", align_corners=True)
        without = image * (a * (1 - up[0])) + baseline * (1 - a * (1 - up[0]))
        alone = image * (b * up[0]) + baseline * (1 - b * up[0])
        loss = (
            torch.softmax(model(without[None]), dim=1)[0, target] / whole
            - torch.softmax(model(alone[None]), dim=1)[0, target] / whole
            + l1 * leaf.mean()
            + tv * ((leaf[1:] - leaf[:-1]).pow(2).mean())
            + tv * ((leaf[:, 1:] - leaf[:, :-1]).pow(2).mean())
        )
        (gradient,) = torch.autograd.grad(loss, leaf)
        mean = 0.9 * mean + 0.1 * gradient
        variance = 0.999 * variance + 0.001 * gradient.pow(2)
        corrected = (variance / (1 - 0.999**number)).sqrt() + 1e-8
        saliency = (saliency - lr * mean / (1 - 0.9**number) / corrected).clamp(0, 1)
    return saliency


def emp(
    model: nn.Module,
    image: Tensor,
    baseline: Tensor,
    target: int,
    start: Tensor,
    iterations: int,
    l1: float,
    tv: float,
) -> Tensor:
    """Meaningful perturbation on one image, with Adam (lr 0.1) written out, from the mask `start`."""
    height, width = image.shape[1:]
    mask = start.clone()
    mean, variance = torch.zeros_like(start), torch.zeros_like(start)
    for number in range(1, iterations + 1):
        leaf = mask.clone().requires_grad_()
        up = F.interpolate(leaf[None, None], (height, width), mode="bilinear", align_corners=True)
        seen = image * up[0] + baseline * (1 - up[0])
        loss = torch.softmax(model(seen[None]), dim=1)[0, target] + l1 * (1 - leaf).abs().mean()
        loss = loss + tv * ((leaf[1:] - leaf[:-1]).abs() ** 3).mean()
        loss = loss + tv * ((leaf[:, 1:] - leaf[:, :-1]).abs() ** 3).mean()
        (gradient,) = torch.autograd.grad(loss, leaf)
        mean = 0.9 * mean + 0.1 * gradient
        variance = 0.999 * variance + 0.001 * gradient**2
        corrected = (variance / (1 - 0.999**number)).sqrt() + 1e-8
        mask = (mask - 0.1 * mean / (1 - 0.9**number) / corrected).clamp(0, 1)
    return mask


def pixel_order(saliency: Tensor) -> list[tuple[int, int]]:
    """All pixels by falling saliency, ties row by row."""
    height, width = saliency.shape
    pixels = [(i, j) for i in range(height) for j in range(width)]
    return sorted(pixels, key=lambda p: -float(saliency[p]))


def moving_curve(
    score: ScoreOf, saliency: Tensor, old: Tensor, new: Tensor, pixels_per_step: int
) -> list[float]:
    """Replace pixels of `old` [C, H, W] by those of `new`, most salient first, and watch the score."""
    order, picture = pixel_order(saliency), old.clone()
    curve = [score(picture)]
    for first in range(0, len(order), pixels_per_step):
        for i, j in order[first : first + pixels_per_step]:
            picture[:, i, j] = new[:, i, j]
        curve.append(score(picture))
    return curve


def rise_auc(scores: list[float]) -> float:
    """The area as RISE computes it."""
    return (sum(scores) - scores[0] / 2 - scores[-1] / 2) / (len(scores) - 1)
