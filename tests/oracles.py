"""The published algorithms as plain loops over one image at a time, to compare the package with."""

from collections.abc import Callable
from itertools import pairwise
from math import exp, log2
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
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
    share: float | None,
) -> tuple[Tensor, list[float], int]:
    """I-GOS on one image [C, H, W]: the last mask, the loss of each iterate, the trials.

    The noise has a standard deviation of 1, and is scaled by a share of each channel's span, or by
    0.25 over the span of what it is added to.
    """
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

    def noisy(picture: Tensor, draws: Tensor) -> Tensor:
        if share is None:
            spread = [0.25 / float((picture.max() - picture.min()).detach())] * 3
        else:
            spread = [share * float(channel.max() - channel.min()) for channel in image]
        return picture + torch.stack(
            [one * noise for one, noise in zip(spread, draws, strict=True)]
        )

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
                total
                + score(noisy(perturbed(s / samples * leaf), noises[iteration][s - 1])) / samples
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


def ranked_mask(
    model: nn.Module,
    image: Tensor,
    baseline: Tensor,
    target: int,
    start: Tensor,
    shares: list[tuple[float, float]],
    lr: float,
    momentum: float,
    temperature: float,
    spread: float,
    balance: float,
    prior: float,
) -> tuple[Tensor, float]:
    """Ranking the pixels of one image: the ranking of the map, and the mean gain of its games."""
    height, width = image.shape[1:]
    n = len(start)

    def score(top: Tensor) -> Tensor:
        up = F.interpolate(top[None, None], (height, width), mode="bilinear", align_corners=True)
        return torch.softmax(model((image * up[0] + baseline * (1 - up[0]))[None]), dim=1)[
            0, target
        ]

    def exceeded_by(share: float, ranking: Tensor) -> Tensor:
        cells = ranking.detach().flatten().sort().values
        place = (1 - share) * (n * n - 1)
        below = cells[int(place)]
        return below + (place - int(place)) * (cells[min(int(place) + 1, n * n - 1)] - below)

    def smoothed(slope: Tensor) -> Tensor:
        weight = [[exp(-(((i - j) / spread) ** 2) / 2) for j in range(n)] for i in range(n)]
        out = torch.zeros_like(slope)
        for i in range(n):
            for j in range(n):
                for k in range(n):
                    for m in range(n):
                        near = weight[i][k] * weight[j][m] / sum(weight[i]) / sum(weight[j])
                        out[i, j] += near * slope[k, m]
        return out

    ranking, velocity, gains = start.clone(), torch.zeros_like(start), []
    for a, b in shares:
        leaf = ranking.clone().requires_grad_()
        removed = torch.sigmoid((leaf - exceeded_by(a, leaf)) / temperature)
        alone = torch.sigmoid((leaf - exceeded_by(b, leaf)) / temperature)
        games = [score(alone), -score(1 - removed)]
        gains.append(sum(game.item() for game in games))
        slope = torch.zeros_like(ranking)
        for game in games:
            (own,) = torch.autograd.grad(game, leaf, retain_graph=True)
            own = smoothed(own - own.mean())
            slope += own / own.abs().max() ** balance
        velocity = momentum * velocity + slope / slope.abs().max()
        ranking = ranking + lr * velocity
    ranking = (ranking - ranking.min()) / (ranking.max() - ranking.min())
    return ranking + prior * start, sum(gains) / len(gains)


def greedy_ranking(
    model: nn.Module, image: Tensor, baseline: Tensor, target: int, cells: int
) -> Tensor:
    """Appending to a list of patches, one image and one candidate after the other."""
    height, width = image.shape[1:]

    def score(kept: set[tuple[int, int]]) -> float:
        picture = baseline.clone()
        for i in range(height):
            for j in range(width):
                if (i * cells // height, j * cells // width) in kept:
                    picture[:, i, j] = image[:, i, j]
        with torch.no_grad():
            return float(torch.softmax(model(picture[None]), dim=1)[0, target])

    left = [(i, j) for i in range(cells) for j in range(cells)]
    every, ranked = set(left), list[tuple[int, int]]()
    while left:
        gains = []
        for patch in left:
            kept = {*ranked, patch}
            gains.append(score(kept) - score(every - kept))
        ranked.append(left.pop(gains.index(max(gains))))
    found = torch.zeros(height, width, dtype=image.dtype)
    for i in range(height):
        for j in range(width):
            place = ranked.index((i * cells // height, j * cells // width))
            found[i, j] = 1 - place / (cells**2 - 1)
    return found


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


def coarse_to_fine(curves: list[list[float]], evaluations: int) -> list[tuple[list[int], float]]:
    """Choose points of an image's full curves, two that share their ends or one: points and error."""
    n, count = len(curves[0]) - 1, len(curves)
    budget = evaluations if count == 2 else evaluations - 1
    coarse = max(2, budget // (4 * count))
    known = [sorted({i * n // coarse for i in range(coarse + 1)}) for _ in curves]

    def gaps() -> list[tuple[float, int, int, int]]:
        found = []
        for game, (curve, points) in enumerate(zip(curves, known, strict=True)):
            ends = list(pairwise(points))
            rough = [(curve[b] - curve[a]) ** 2 / (b - a) for a, b in ends]
            for i, (a, b) in enumerate(ends):
                near = [rough[j] for j in (i - 1, i + 1) if 0 <= j < len(ends)]
                mean = (rough[i] + sum(near) / 2) / (1 + len(near) / 2)
                found.append((mean * (b - a) * ((b - a) ** 2 - 1) / 12, game, a, b))
        return found

    left = budget - coarse * count
    while left:
        now = min(-(-budget // 8), left)
        wide = sorted((g for g in gaps() if g[3] - g[2] > 1), reverse=True, key=lambda g: g[0])[
            :now
        ]
        for _, game, a, b in wide:
            known[game].append((a + b) // 2)
        spare = [(g, i) for g in range(count) for i in range(n + 1) if i not in known[g]]
        for game, i in spare[: now - len(wide)]:
            known[game].append(i)
        known = [sorted(points) for points in known]
        left -= now
    return [
        (known[i], 4 / 3 * sum(v for v, game, _, _ in gaps() if game == i) ** 0.5 / n)
        for i in range(count)
    ]


def rise_auc(scores: list[float]) -> float:
    """The area as RISE computes it."""
    return (sum(scores) - scores[0] / 2 - scores[-1] / 2) / (len(scores) - 1)


def rise(
    model: nn.Module,
    image: Tensor,
    target: int,
    grids: list[Tensor],
    offsets: list[tuple[int, int]],
    probability: float,
) -> Tensor:
    """RISE on one image, a mask at a time, before it is scaled to [0, 1]."""
    height, width = image.shape[1:]
    cells = len(grids[0])

    def spread(size: int, offset: int) -> Tensor:
        """How much of each cell every pixel of one direction gets."""
        weights = torch.zeros(size, cells, dtype=image.dtype)
        cell = (size + cells - 1) // cells
        for pixel in range(size):
            place = (pixel + offset + 0.5) * cells / ((cells + 1) * cell) - 0.5
            place = min(max(place, 0.0), cells - 1.0)
            left = int(place)
            weights[pixel, left] += 1 - (place - left)
            weights[pixel, min(left + 1, cells - 1)] += place - left
        return weights

    total = torch.zeros(height, width, dtype=image.dtype)
    with torch.no_grad():
        for grid, (top, left) in zip(grids, offsets, strict=True):
            mask = spread(height, top) @ grid.to(image.dtype) @ spread(width, left).T
            total += torch.softmax(model((image * mask)[None]), dim=1)[0, target] * mask
    return total / len(grids) / probability


def regional_multiscale(
    model: nn.Module,
    image: Tensor,
    target: int,
    labels: list[Tensor],
    noise: list[Tensor],
    examples: int,
) -> Tensor:
    """Prediction difference over the regions of several label maps, before it is scaled to [0, 1]."""
    channels, height, width = image.shape
    places = [(i, j) for i in range(height) for j in range(width)]
    border = [(i, j) for i, j in places if i in (0, height - 1) or j in (0, width - 1)]
    means, spreads = [], []
    for channel in range(channels):
        values = [float(image[channel, i, j]) for i, j in border]
        means.append(sum(values) / len(values))
        spreads.append((sum((v - means[-1]) ** 2 for v in values) / len(values)) ** 0.5)

    def probabilities(picture: Tensor) -> list[float]:
        with torch.no_grad():
            return [float(p) for p in torch.softmax(model(picture[None]), dim=1)[0]]

    def log_odds(p: float, classes: int) -> float:
        corrected = (p * examples + 1) / (examples + classes)
        return log2(corrected / (1 - corrected))

    given = probabilities(image)
    total = torch.zeros(height, width, dtype=image.dtype)
    for label_map in labels:
        for region in sorted({int(label) for label in label_map.flatten()}):
            inside = [(i, j) for i, j in places if int(label_map[i, j]) == region]
            left = 0.0
            for drawn in noise:
                picture = image.clone()
                for i, j in inside:
                    for channel in range(channels):
                        fill = means[channel] + spreads[channel] * float(drawn[channel, i, j])
                        picture[channel, i, j] = fill
                left += probabilities(picture)[target] / len(noise)
            evidence = log_odds(given[target], len(given)) - log_odds(left, len(given))
            for i, j in inside:
                total[i, j] += evidence / len(labels)
    return total


Walk = tuple[Tensor, Callable[[Tensor], Tensor]]


def excitation(module: Any, x: Tensor) -> Walk:
    """Excitation backprop of one image through a module of torch or a block of torchvision.

    Returns the module's output for the activations `x`, [C, H, W] or [C], and the function from the
    signal at that output to the signal at `x`.
    """
    if isinstance(module, nn.Conv2d):
        stride, padding = module.stride[0], int(module.padding[0])
        return module(x[None])[0], lambda p: _excited_conv(x, module, p, stride, padding)
    if isinstance(module, nn.Linear):
        positive = module.weight.clamp(min=0)
        share = torch.einsum("oi,i->o", positive, x) + 1e-20
        return module(x), lambda p: x * torch.einsum("oi,o->i", positive, p / share)
    if isinstance(module, nn.BatchNorm2d):
        return module(x[None])[0], lambda p: p
    if isinstance(module, (nn.ReLU, nn.ReLU6)):
        top = 6.0 if isinstance(module, nn.ReLU6) else float("inf")
        return x.clamp(0, top), lambda p: p * ((x > 0) & (x < top))
    if isinstance(module, nn.Dropout):
        return x, lambda p: p
    if isinstance(module, nn.Flatten):
        return x.flatten(), lambda p: p.reshape(x.shape)
    if isinstance(module, (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)):
        output = module(x[None])[0]
        return output, lambda p: _excited_pool(x, module, output, p)
    if isinstance(module, nn.Sequential):
        return _excited_chain(list(module), x)
    if isinstance(module, torchvision.models.squeezenet.Fire):
        middle, squeezed = _excited_chain([module.squeeze, nn.ReLU()], x)
        small, from_small = _excited_chain([module.expand1x1, nn.ReLU()], middle)
        large, from_large = _excited_chain([module.expand3x3, nn.ReLU()], middle)
        n = len(small)
        return torch.cat([small, large]), lambda p: squeezed(from_small(p[:n]) + from_large(p[n:]))
    if isinstance(module, torchvision.models.mobilenetv2.InvertedResidual):
        if not module.use_res_connect:
            return excitation(module.conv, x)
        return _excited_sum(x, excitation(module.conv, x), (x, lambda p: p))
    if isinstance(module, torchvision.models.resnet.BasicBlock):
        names = ("conv1", "bn1", "relu", "conv2", "bn2")
        branch = _excited_chain([getattr(module, name) for name in names], x)
        beside = excitation(module.downsample or nn.Sequential(), x)
        added, apart = _excited_sum(x, branch, beside)
        output, masked = excitation(nn.ReLU(), added)
        return output, lambda p: apart(masked(p))
    raise NotImplementedError(type(module).__name__)


def _excited_chain(modules: list[nn.Module], x: Tensor) -> Walk:
    backs = []
    for module in modules:
        x, back = excitation(module, x)
        backs.append(back)

    def walk(p: Tensor) -> Tensor:
        for back in reversed(backs):
            p = back(p)
        return p

    return x, walk


def _excited_sum(x: Tensor, first: Walk, second: Walk) -> Walk:
    (a, from_a), (b, from_b) = first, second
    total = a + b
    return total, lambda p: from_a(a / total * p) + from_b(b / total * p)


def _excited_conv(x: Tensor, conv: nn.Conv2d, p: Tensor, stride: int, padding: int) -> Tensor:
    """One output position after the other."""
    (height, width), groups = x.shape[1:], conv.groups
    padded = torch.zeros(len(x), height + 2 * padding, width + 2 * padding, dtype=x.dtype)
    padded[:, padding : padding + height, padding : padding + width] = x
    signal = torch.zeros_like(padded)
    positive = conv.weight.clamp(min=0)
    inputs, outputs, (high, wide) = len(x) // groups, len(p) // groups, positive.shape[2:]
    for g in range(groups):
        weights = positive[g * outputs : (g + 1) * outputs]
        for i in range(p.shape[1]):
            for j in range(p.shape[2]):
                rows, columns = (
                    slice(i * stride, i * stride + high),
                    slice(j * stride, j * stride + wide),
                )
                channels = slice(g * inputs, (g + 1) * inputs)
                seen = padded[channels, rows, columns]
                share = torch.einsum("ocyx,cyx->o", weights, seen) + 1e-20
                arriving = p[g * outputs : (g + 1) * outputs, i, j] / share
                signal[channels, rows, columns] += seen * torch.einsum(
                    "ocyx,o->cyx", weights, arriving
                )
    return signal[:, padding : padding + height, padding : padding + width]


def _excited_pool(x: Tensor, pool: Any, output: Tensor, p: Tensor) -> Tensor:
    signal = torch.zeros_like(x)
    for i in range(p.shape[1]):
        for j in range(p.shape[2]):
            if isinstance(pool, nn.AdaptiveAvgPool2d):
                (high, wide), (n, m) = x.shape[1:], p.shape[1:]
                rows = range(i * high // n, -(-(i + 1) * high // n))
                columns = range(j * wide // m, -(-(j + 1) * wide // m))
            else:
                padding = int(pool.padding)
                top, left = i * int(pool.stride) - padding, j * int(pool.stride) - padding
                rows = range(max(top, 0), min(top + int(pool.kernel_size), x.shape[1]))
                columns = range(max(left, 0), min(left + int(pool.kernel_size), x.shape[2]))
            for c in range(len(x)):
                seen = x[c, rows.start : rows.stop, columns.start : columns.stop]
                part = signal[c, rows.start : rows.stop, columns.start : columns.stop]
                if isinstance(pool, nn.MaxPool2d):
                    row, column = divmod(int(seen.argmax()), seen.shape[1])
                    part[row, column] += p[c, i, j]
                else:
                    part += seen / (seen.sum() + 1e-20) * p[c, i, j]
    return signal
