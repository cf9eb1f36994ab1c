"""The time that the same work takes here and in other packages, beside that of the bare model.

    pip install captum grad-cam torchcam quantus pandas
    OMP_NUM_THREADS=1 python benchmarks/peers.py --json peers.json --markdown peers.md

Each race gives all tools the same network, pictures, targets, dtype and threads. Their results are
compared first; a tool that disagrees, or isn't installed, is named and not timed. Then they take
turns, in another order each round; the table has medians and quartiles. Evaluations are counted by
hooks on the network. The floor of a run is the time that as many evaluations take at the batch size at
which this network is fastest, forwards and backwards apart.

Peers are used as their documentation says, on a batch where they take one. What they leave out (an
enlarged, stretched map of captum) is done with torch, in the time measured.
"""

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from lightning_aop import AOP, GradCAM, __version__, fast_sigcam, sigcam
from lightning_aop.cam import LayerCAM, XGradCAM
from lightning_aop.metrics.functional import deletion_curve, deletion_insertion_curves
from lightning_aop.ops import Constant, min_max
from lightning_aop.perturbation import IGOS
from lightning_aop.probing import count_evaluations
from lightning_aop.regions import RISE

OURS = "lightning_aop"
STEPS = 28
# The last convolution, by network.
LAYERS = {
    "resnet50": "layer4",
    "resnet18": "layer4",
    "squeezenet1_1": "features.12",
    "mobilenet_v2": "features",
}


@dataclass
class Batch:
    """What all tools are given."""

    model: nn.Module
    layer: str
    images: Tensor
    targets: Tensor

    @property
    def module(self) -> nn.Module:
        """The layer itself."""
        return self.model.get_submodule(self.layer)


@dataclass
class Run:
    """One tool's times in one race."""

    tool: str
    work: Callable[[], Tensor]
    difference: float | None = None
    forwards: int = 0
    backwards: int = 0
    peak_mib: float | None = None
    seconds: list[float] = field(default_factory=list)
    trouble: str | None = None


def races(batch: Batch) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Return the work of each tool in each race, ours first."""
    model, images, targets = batch.model, batch.images, batch.targets
    small = images[:1], targets[:1]
    ramp = torch.rand(len(images), *images.shape[2:], generator=torch.Generator().manual_seed(0))
    ours = {"GradCAM": GradCAM, "XGradCAM": XGradCAM, "LayerCAM": LayerCAM}
    found: dict[str, dict[str, Callable[[], Tensor]]] = {}
    for name, method in ours.items():
        found[name] = {
            OURS: lambda method=method: method(batch.layer).explain(model, images, targets),  # type: ignore[misc]
            "grad-cam": lambda name=name: _grad_cam(batch, name),  # type: ignore[misc]
        }
    found["GradCAM"] |= {"captum": lambda: _captum(batch), "torchcam": lambda: _torchcam(batch)}
    chunk = 32
    found["deletion curve"] = {
        OURS: lambda: deletion_curve(
            model, images, ramp, targets, fill=Constant(0.0), steps=STEPS, eval_batch_size=chunk
        )[:, 1:],
        "quantus": lambda: _quantus(batch, ramp),
    }
    found["both curves"] = {
        OURS: lambda: torch.cat(
            deletion_insertion_curves(model, images, ramp, targets, steps=STEPS), dim=1
        )
    }
    found["RISE, 256 masks"] = {
        OURS: lambda: RISE(masks=256).explain(model, *small),
    }
    found["I-GOS"] = {
        OURS: lambda: AOP(GradCAM(batch.layer), IGOS()).explain(model, *small),
    }
    found["sigcam()"] = {OURS: lambda: sigcam(batch.layer).explain(model, *small)}
    found["fast_sigcam()"] = {
        OURS: lambda: fast_sigcam(batch.layer).explain(model, images, targets)
    }
    return found


def _grad_cam(batch: Batch, name: str) -> Tensor:
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with getattr(pytorch_grad_cam, name)(model=batch.model, target_layers=[batch.module]) as cam:
        chosen = [ClassifierOutputTarget(int(t)) for t in batch.targets]
        return torch.from_numpy(cam(input_tensor=batch.images, targets=chosen))


def _captum(batch: Batch) -> Tensor:
    from captum.attr import LayerAttribution, LayerGradCam

    maps = LayerGradCam(batch.model, batch.module).attribute(
        batch.images, batch.targets, relu_attributions=True
    )
    size = tuple(batch.images.shape[2:])
    large = LayerAttribution.interpolate(maps, size, interpolate_mode="bilinear")
    return min_max(large[:, 0].detach())


def _torchcam(batch: Batch) -> Tensor:
    from torchcam.methods import GradCAM as Peer

    with Peer(batch.model, batch.layer) as cam:
        scores = batch.model(batch.images.clone().requires_grad_())
        (maps,) = cam(batch.targets.tolist(), scores)
    large = F.interpolate(maps.detach()[:, None], batch.images.shape[2:], mode="bilinear")
    return min_max(large[:, 0])


def _quantus(batch: Batch, maps: Tensor) -> Tensor:
    import quantus

    # It moves the values of the three channels one by one: a third of a step for each of ours.
    height, width = batch.images.shape[2:]
    metric = quantus.PixelFlipping(
        features_in_step=height * width // STEPS,
        perturb_baseline=0.0,
        normalise=False,
        disable_warnings=True,
        display_progressbar=False,
    )
    curves = metric(
        model=batch.model,
        x_batch=batch.images.numpy(),
        y_batch=batch.targets.numpy(),
        a_batch=maps[:, None].numpy(),
        softmax=True,
        device="cpu",
        batch_size=len(batch.images),
    )
    return torch.tensor(curves)[:, 2::3]


# --------------------------------------------------------------------------------------------------


@contextmanager
def quietly() -> Iterator[None]:
    """Leave out what other packages warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def photos(count: int, side: int) -> Tensor:
    """Return crops of scikit-image's photos, normalised as for ImageNet."""
    import skimage

    crops = []
    for n in range(count):
        name = ("chelsea", "coffee", "astronaut", "rocket")[n % 4]
        photo = torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1) / 255
        height, width = photo.shape[1:]
        short, shift = min(height, width), n // 4 * 16
        square = photo[None, :, height - short : height - shift, shift:short]
        crops.append(F.interpolate(square, (side, side), mode="bilinear", antialias=True))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    return (torch.cat(crops) - mean) / std


def bare_seconds(batch: Batch, repeats: int) -> tuple[float, float, dict[int, tuple[float, float]]]:
    """Return the seconds of a forward and of a backward at the best batch size, and at each size."""
    times: dict[int, tuple[float, float]] = {}
    for size in (1, 2, 4, 8, 16, 32):
        images = batch.images.repeat(-(-size // len(batch.images)), 1, 1, 1)[:size]
        forward, backward = [], []
        for _ in range(repeats):
            started = time.perf_counter()
            with torch.no_grad():
                batch.model(images)
            forward.append((time.perf_counter() - started) / size)
            x = images.clone().requires_grad_()
            logits = batch.model(x)
            started = time.perf_counter()
            torch.autograd.grad(logits.sum(), x)
            backward.append((time.perf_counter() - started) / size)
        times[size] = statistics.median(forward), statistics.median(backward)
    return min(f for f, _ in times.values()), min(b for _, b in times.values()), times


def prepare(work: dict[str, Callable[[], Tensor]], batch: Batch) -> list[Run]:
    """Run each tool once, count its evaluations, and compare its result with ours."""
    runs, expected = [], None
    for tool, call in work.items():
        run = Run(tool, call)
        runs.append(run)
        try:
            with quietly(), count_evaluations(batch.model) as count:
                result = call()
        except Exception as error:
            run.trouble = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        run.forwards, run.backwards = count.forward, count.backward
        with quietly():
            run.peak_mib = peak_mib(call)  # the first call has paid for imports
        if expected is None:
            expected = result
            continue
        # Maps are stretched before they are enlarged, or after.
        both = [min_max(x) if x.ndim == 3 else x for x in (result, expected)]
        run.difference = float((both[0] - both[1]).abs().max())
        if run.difference > 0.01:
            run.trouble = f"its result differs by {run.difference:.2g}"
    return runs


def race(runs: list[Run], repeats: int) -> None:
    """Let the tools take turns."""
    able = [run for run in runs if run.trouble is None]
    for number in range(repeats):
        start = number % len(able)
        for run in able[start:] + able[:start]:
            with quietly():
                started = time.perf_counter()
                run.work()
                run.seconds.append(time.perf_counter() - started)


def peak_mib(work: Callable[[], Tensor]) -> float | None:
    """Return how far resident memory rises above where it was, in MiB; None but on Linux with glibc."""
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # else what was freed stays resident, and hides a rise
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
        before = _status_kib("VmRSS")
        work()
        return max(0, _status_kib("VmHWM") - before) / 1024
    except (OSError, AttributeError):  # no such file, or no glibc
        return None


def _status_kib(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")


def each(run: Run) -> float:
    """Return the median seconds of an evaluation, forward or backward."""
    return statistics.median(run.seconds) / (run.forwards + run.backwards)


def main() -> None:
    """Measure, print a table, and write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--network", default="resnet50", choices=LAYERS)
    add("--weights", type=Path, help="a state_dict; by default random weights, which take as long")
    add("--images", type=int, default=8)
    add("--side", type=int, default=224, help="of a picture, in pixels")
    add("--repeats", type=int, default=7)
    add("--threads", type=int, default=1)
    add("--only", nargs="*", help="the races to run")
    add("--json", type=Path)
    add("--markdown", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = torchvision.models.get_model(options.network, weights=None)
    if options.weights is not None:
        model.load_state_dict(torch.load(options.weights, weights_only=True))
    images = photos(options.images, options.side)
    with torch.no_grad():
        targets = model.eval()(images).argmax(dim=1)
    batch = Batch(model, LAYERS[options.network], images, targets)
    forward, backward, sizes = bare_seconds(batch, max(3, options.repeats // 2))
    machine = {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "system": platform.platform(),
        "mkl": torch.backends.mkl.is_available(),
        "onednn": torch.backends.mkldnn.is_available(),
        "torch_build": torch.__config__.show(),
        "threads": options.threads,
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES} | {OURS: __version__},
    }
    lines = [
        f"{options.network}, {options.images} pictures of {options.side} x {options.side}, float32, "
        f"{options.threads} thread{'s' * (options.threads > 1)}, median [quartiles] of "
        f"{options.repeats} rounds. {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gib']:.0f} GiB, {machine['system']}; "
        + ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
        + f". Bare: {1000 * forward:.1f} ms a forward, {1000 * backward:.1f} ms a backward.",
        "",
        "| work | tool | seconds | evaluations | times floor | an evaluation, times ours | "
        "largest difference | peak memory, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    results: list[dict[str, Any]] = []
    for name, work in races(batch).items():
        if options.only and name not in options.only:
            continue
        runs = prepare(work, batch)
        race(runs, options.repeats)
        own = each(runs[0]) if runs[0].seconds else None
        for run in runs:
            floor = run.forwards * forward + run.backwards * backward
            line = f"| {name} | {run.tool} | "
            if run.trouble is not None or own is None:
                line += f"{run.trouble} | | | | | |"
            else:
                low, middle, high = statistics.quantiles(run.seconds, n=4)
                difference = "" if run.difference is None else f"{run.difference:.1g}"
                peak = "" if run.peak_mib is None else f"{run.peak_mib:.0f}"
                line += (
                    f"{middle:.3f} [{low:.3f}, {high:.3f}] | {run.forwards} + {run.backwards} | "
                    f"{middle / floor:.2f} | {each(run) / own:.2f} | {difference} | {peak} |"
                )
            lines.append(line)
            print(line, flush=True)
            kept = {k: v for k, v in vars(run).items() if k != "work"}
            results.append({"work": name, "floor": floor, **kept})
            if options.json is not None:  # as it goes: a long run may be stopped
                whole = {"machine": machine, "bare": sizes, "results": results}
                options.json.write_text(json.dumps(whole, indent=1))
            if options.markdown is not None:
                options.markdown.write_text("\n".join(lines) + "\n")


PACKAGES = ("torch", "torchvision", "captum", "grad-cam", "torchcam", "quantus")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
