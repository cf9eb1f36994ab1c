"""Leaving out a frozen backbone changes no map, and is noticed to be wrong whenever it would be."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torchvision
from conftest import SmallNet, assert_same, snapshot
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_aop import ExplanationMonitor
from lightning_aop.methods.aop import fast_sigcam
from lightning_aop.methods.cam import CAM, GradCAM, HiResCAM
from lightning_aop.model.adapter import predict
from lightning_aop.model.frozen import FrozenPart, _checksums

IMAGES = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([0, 3, 1, 2])


class Convolutions(TorchFunctionMode):
    """Counts the images that go through convolutions, for each number of channels that come out."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.conv2d, torch.nn.functional.conv2d):
            self.images.append(len(args[0]))
        return func(*args, **(kwargs or {}))


def convolutions(work: Callable[[], Any]) -> int:
    with Convolutions() as heard:
        work()
    return len(heard.images)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return all but Python's random state, from which the type checker of these tests draws."""
    found = snapshot(model)
    del found["rng"][1]
    return found


def freeze(*modules: nn.Module) -> None:
    for module in modules:
        module.requires_grad_(False)


def torchvision_model(name: str, *frozen: str) -> nn.Module:
    torch.manual_seed(0)
    more = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, num_classes=5, **more)
    freeze(*(model.get_submodule(part) for part in frozen))
    return model.eval()


# The model, what is frozen, the convolutions of a whole forward, and of one from the cut on.
RESNET = ("conv1", "bn1", "layer1", "layer2", "layer3")
NETWORKS = {
    "resnet18, head": ("resnet18", (*RESNET, "layer4"), 20, 0),
    "resnet18, last stage": ("resnet18", RESNET, 20, 5),
    "mobilenet_v3_small, head": ("mobilenet_v3_small", ("features",), 52, 0),
    "densenet121, head": ("densenet121", ("features",), 120, 0),
    "densenet121, last block": (
        "densenet121",
        (
            *(f"features.{name}{i}" for i in (1, 2, 3) for name in ("denseblock", "transition")),
            "features.conv0",
            "features.norm0",
        ),
        120,
        32,
    ),
    "googlenet, last blocks": (
        "googlenet",
        tuple(
            name
            for name, _ in torchvision.models.googlenet(
                weights=None, init_weights=False, aux_logits=False
            ).named_children()
            if name[0] in "ci" and not name.startswith("inception5")
        ),
        57,
        12,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_are_the_same_at_the_cost_of_the_head(name: str) -> None:
    network, frozen_modules, whole, head = NETWORKS[name]
    model = torchvision_model(network, *frozen_modules)
    method = GradCAM()
    frozen = FrozenPart()
    expected = method.explain(model, IMAGES, TARGETS)

    def run() -> Tensor:
        with frozen.kept(model, images=4):
            return method.explain(model, IMAGES, TARGETS)

    assert convolutions(lambda: method.explain(model, IMAGES, TARGETS)) == whole
    torch.testing.assert_close(run(), expected, rtol=0, atol=1e-6)
    assert convolutions(run) == head
    torch.testing.assert_close(run(), expected, rtol=0, atol=1e-6)
    assert frozen.reused == 8
    before = state_of(model)
    with frozen.kept(model, images=4):
        method.explain(model, IMAGES, TARGETS)
    assert_same(before, state_of(model))
    # In another order, and in passes of another size.
    with frozen.kept(model, images=4):
        turned = GradCAM(eval_batch_size=3).explain(model, IMAGES.flip(0), TARGETS.flip(0))
    assert frozen.reused == 16
    torch.testing.assert_close(turned.flip(0), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [GradCAM(), CAM(), HiResCAM(), fast_sigcam(iterations=2)])
def test_every_activation_map_starts_at_the_cut(method: Any) -> None:
    model = torchvision_model("resnet18", *RESNET, "layer4")
    frozen = FrozenPart()
    expected = method.explain(model, IMAGES, TARGETS)
    for _ in range(2):
        with frozen.kept(model, images=4):
            maps = method.explain(model, IMAGES, TARGETS)
        torch.testing.assert_close(maps, expected, rtol=0, atol=1e-4)
    # Perturbed images are new each time; only the base map is made of known ones.
    assert frozen.reused == 4


def test_predictions() -> None:
    model = torchvision_model("resnet18", *RESNET, "layer4")
    frozen = FrozenPart()

    def run() -> Tensor:
        with frozen.kept(model, images=4):
            return predict(model, IMAGES)

    run()
    torch.testing.assert_close(run(), predict(model, IMAGES))
    assert convolutions(run) == 0


def test_a_head_that_trains_has_its_own_maps() -> None:
    model = torchvision_model("resnet18", *RESNET, "layer4")
    frozen, method = FrozenPart(), GradCAM()
    with frozen.kept(model, images=4):
        first = method.explain(model, IMAGES, TARGETS)
    with torch.no_grad():
        model.fc.weight.normal_()
    expected = method.explain(model, IMAGES, TARGETS)
    assert (expected - first).abs().max() > 0.1
    with frozen.kept(model, images=4):
        maps = method.explain(model, IMAGES, TARGETS)
    assert frozen.reused == 4
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-6)


def _data(model: Any) -> None:
    model.layer2[0].conv1.weight.data[0, 0, 0, 0] += 1e-4  # unseen by the version counter


def _in_place(model: Any) -> None:
    with torch.no_grad():
        model.layer2[0].conv1.weight.mul_(1.5)


def _replaced(model: Any) -> None:
    model.conv1.weight = nn.Parameter(model.conv1.weight * 2, requires_grad=False)


def _statistics(model: Any) -> None:
    model.train()(torch.rand(4, 3, 64, 64))
    model.eval()


def _swapped(model: Any) -> None:
    weight = model.layer3[0].conv1.weight.data
    weight[[0, 1]] = weight[[1, 0]]


def _stride(model: Any) -> None:
    model.layer3[0].conv1.stride = model.layer3[0].downsample[0].stride = (1, 1)


def _another(model: Any) -> None:
    model.layer3 = copy.deepcopy(model.layer3)
    _in_place(model)


def _number(model: Any) -> None:
    model.factor = 3.0


class Scaled(nn.Module):
    """A network with a number of its own before the frozen part."""

    def __init__(self) -> None:
        super().__init__()
        net = torchvision_model("resnet18", *RESNET, "layer4")
        for name, child in net.named_children():
            self.add_module(name, child)
        self.factor = 1.0

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = images * self.factor
        for child in self.children():
            x = child(x).flatten(1) if isinstance(child, nn.AdaptiveAvgPool2d) else child(x)
        return x


@pytest.mark.parametrize(
    "change", [_data, _in_place, _replaced, _statistics, _swapped, _stride, _another, _number]
)
def test_a_changed_backbone_is_evaluated_again(change: Callable[[Any], None]) -> None:
    model = Scaled().eval()
    frozen, method = FrozenPart(), GradCAM("layer4")
    for _ in range(2):
        with frozen.kept(model, images=4):
            method.explain(model, IMAGES, TARGETS)
    assert frozen.reused == 4
    change(model)
    for _ in range(2):
        with frozen.kept(model, images=4):
            maps = method.explain(model, IMAGES, TARGETS)
        torch.testing.assert_close(maps, method.explain(model, IMAGES, TARGETS), rtol=0, atol=1e-6)
    assert frozen.reused == 8


def test_other_images_are_evaluated() -> None:
    model = torchvision_model("resnet18", *RESNET, "layer4")
    frozen, method = FrozenPart(), GradCAM()
    other = IMAGES.clone()
    other[2, 1, 5, 5] += 1e-6
    with frozen.kept(model, images=4):
        method.explain(model, IMAGES, TARGETS)
        maps = method.explain(model, other, TARGETS)
    assert frozen.reused == 0
    torch.testing.assert_close(maps, method.explain(model, other, TARGETS), rtol=0, atol=1e-6)
    (part,) = frozen._parts.values()
    assert part is not None
    assert len(part.activations) == 4  # no room for a fifth


def test_unfreezing_moves_the_cut() -> None:
    model: Any = torchvision_model("resnet18", *RESNET, "layer4")
    frozen, method = FrozenPart(), GradCAM("layer4")

    def run() -> Tensor:
        with frozen.kept(model, images=4):
            return method.explain(model, IMAGES, TARGETS)

    run()
    assert convolutions(run) == 0
    model.layer4.requires_grad_(True)
    run()
    assert convolutions(run) == 5
    model.requires_grad_(True)
    run()
    assert convolutions(run) == 20


# --------------------------------------------------------------------------------------------------
# models that must be evaluated as ever


class Net(nn.Module):
    """Three stages, of which the last is trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(8, 5)
        freeze(self.one, self.two)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.two(self.one(images)).mean(dim=(2, 3)))
        return logits


class Skipping(Net):
    """What follows the last feature map also hears an earlier one."""

    def forward(self, images: Tensor) -> Tensor:
        early = self.one(images)
        logits: Tensor = self.head(self.two(early).mean(dim=(2, 3)) + early.mean(dim=(2, 3)))
        return logits


class Looking(Net):
    """What follows hears the picture itself, which is not left out."""

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = super().forward(images)
        return logits * images.mean(dim=(1, 2, 3))[:, None]


class Noisy(Net):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images + 0.1 * torch.rand(1))


class Stashing(Net):
    """A stage leaves something for the head."""

    def forward(self, images: Tensor) -> Tensor:
        early = self.one(images)
        self.one.early = early.mean(dim=(2, 3))
        logits: Tensor = self.head(self.two(early).mean(dim=(2, 3)) + self.one.early)
        return logits


class OfTheBatch(Net):
    def __init__(self) -> None:
        super().__init__()
        self.one.append(nn.BatchNorm2d(8, track_running_stats=False, affine=False))


class Tied(Net):
    """A parameter that is trained takes part early, as an argument of a function."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images * self.head.weight.mean())


class Deciding(Net):
    """What is NaN would be hidden by a decision."""

    def forward(self, images: Tensor) -> Tensor:
        early = self.one(images)
        gate = (early.mean(dim=(2, 3)) > 0.2).float()
        logits: Tensor = self.head(self.two(early).mean(dim=(2, 3)) * gate)
        return logits


@pytest.mark.parametrize("kind", [Skipping, Noisy, Stashing, OfTheBatch, Tied, Deciding])
def test_models_that_do_not_fit_are_evaluated_as_ever(kind: type[Net]) -> None:
    model, method, frozen = kind().eval(), GradCAM("two"), FrozenPart()
    for turn in range(3):
        with torch.no_grad():
            model.head.weight.normal_(generator=torch.Generator().manual_seed(turn))
        with frozen.kept(model, images=4):
            maps = method.explain(model, IMAGES, TARGETS)
        torch.testing.assert_close(maps, method.explain(model, IMAGES, TARGETS), rtol=0, atol=1e-5)
    whole = convolutions(lambda: method.explain(model, IMAGES, TARGETS))

    def run() -> None:
        with frozen.kept(model, images=4):
            method.explain(model, IMAGES, TARGETS)

    # At most what comes before the first thing that does not fit is left out.
    assert convolutions(run) >= (1 if kind in (Skipping, Deciding, OfTheBatch) else whole)


def test_what_hears_the_picture_itself_still_does() -> None:
    model, method, frozen = Looking().eval(), GradCAM("two"), FrozenPart()
    for _ in range(2):
        with frozen.kept(model, images=4):
            maps = method.explain(model, IMAGES, TARGETS)
    assert frozen.reused == 4
    torch.testing.assert_close(maps, method.explain(model, IMAGES, TARGETS), rtol=0, atol=1e-6)


class Opening(Net):
    """A connection past the cut that is closed at first."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        early = self.one(images)
        late = self.two(early).mean(dim=(2, 3))
        if self.gate.item():
            late = late + self.gate * early.mean(dim=(2, 3))
        logits: Tensor = self.head(late)
        return logits


def test_a_connection_that_opens_later_is_noticed() -> None:
    model, method, frozen = Opening().eval(), GradCAM("two"), FrozenPart()
    for _ in range(2):
        with frozen.kept(model, images=4):
            method.explain(model, IMAGES, TARGETS)
    assert frozen.reused == 4
    with torch.no_grad():
        model.gate.fill_(1.0)
    with frozen.kept(model, images=4):
        maps = method.explain(model, IMAGES, TARGETS)
    assert frozen.reused == 4
    torch.testing.assert_close(maps, method.explain(model, IMAGES, TARGETS), rtol=0, atol=1e-6)


def test_hooks_in_the_backbone_are_heard() -> None:
    model, frozen = Net().eval(), FrozenPart()
    heard: list[float] = []
    handle = model.one[0].register_forward_hook(lambda m, a, out: heard.append(float(out.sum())))
    for _ in range(2):
        with frozen.kept(model, images=4):
            GradCAM("two").explain(model, IMAGES, TARGETS)
    handle.remove()
    assert frozen.reused == 0
    assert torch.tensor(heard).isfinite().all()


def test_a_module_that_is_called_before_and_after() -> None:
    class Shared(Net):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()
            self.last = nn.Conv2d(8, 8, 1)

        def forward(self, images: Tensor) -> Tensor:
            x = self.two(self.relu(self.one[0](images)))
            logits: Tensor = self.head(self.relu(self.last(x)).mean(dim=(2, 3)))
            return logits

    model, frozen = Shared().eval(), FrozenPart()
    for _ in range(2):
        with frozen.kept(model, images=4):
            maps = GradCAM("last").explain(model, IMAGES, TARGETS)
    assert frozen.reused == 4
    expected = GradCAM("last").explain(model, IMAGES, TARGETS)
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_scripted_and_compiled_models() -> None:
    scripted = Net().eval()
    scripted.one = torch.jit.script(scripted.one)
    compiled = Net().eval()
    compiled.two = torch.compile(compiled.two, backend="eager")
    for model in (scripted, compiled):
        frozen = FrozenPart()
        layer = "two" if model is scripted else "two._orig_mod"
        for _ in range(2):
            with frozen.kept(model, images=4):
                maps = GradCAM(layer).explain(model, IMAGES, TARGETS)
        torch.testing.assert_close(maps, GradCAM(layer).explain(model, IMAGES, TARGETS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model, frozen = Net().eval().to(dtype), FrozenPart()
    expected = GradCAM("two").explain(model, IMAGES, TARGETS)
    for _ in range(2):
        with frozen.kept(model, images=4):
            maps = GradCAM("two").explain(model, IMAGES, TARGETS)
    assert frozen.reused == 4
    assert torch.equal(maps, expected)


def test_autocast_has_activations_of_its_own() -> None:
    model, frozen = Net().eval(), FrozenPart()
    for _ in range(2):
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                with frozen.kept(model, images=4):
                    maps = GradCAM("two").explain(model, IMAGES, TARGETS)
                expected = GradCAM("two").explain(model, IMAGES, TARGETS)
            assert torch.equal(maps, expected)
    assert frozen.reused == 8


def test_an_error_leaves_nothing_behind() -> None:
    class Failing(Net):
        fail = False

        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            if self.fail:
                raise KeyboardInterrupt
            return logits

    model, frozen = Failing().eval(), FrozenPart()
    for _ in range(2):
        with frozen.kept(model, images=4):
            GradCAM("two").explain(model, IMAGES, TARGETS)
    before = state_of(model)
    Failing.fail = True
    with pytest.raises(KeyboardInterrupt), frozen.kept(model, images=4):
        GradCAM("two").explain(model, IMAGES, TARGETS)
    assert_same(before, state_of(model))


def test_copies_keep_their_own() -> None:
    model, frozen = Net().eval(), FrozenPart()
    with frozen.kept(model, images=4):
        GradCAM("two").explain(model, IMAGES, TARGETS)
    for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert other._parts == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda() -> None:
    model = torchvision_model("resnet18", *RESNET, "layer4").cuda()
    images, targets = IMAGES.cuda(), TARGETS.cuda()
    frozen, method = FrozenPart(), GradCAM()
    expected = method.explain(model, images, targets)
    for _ in range(2):
        with frozen.kept(model, images=4):
            maps = method.explain(model, images, targets)
    assert frozen.reused == 4
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# checksums


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_every_bit_changes_the_checksum(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (70_000 * 8,), dtype=torch.uint8, generator=generator)
    seen = set()
    places = [0, 1, 7, 65_535 * 4, 2**18, 2**18 + 1, len(values) - 1]
    for place, bit in [(None, 0), *((place, bit) for place in places for bit in range(8))]:
        changed = values.clone()
        if place is not None:
            changed[place] ^= 1 << bit
        seen.add(int(_checksums(changed.view(dtype)[None])))
    assert len(seen) == 1 + 8 * len(places)


def test_changes_that_make_up_for_each_other_change_the_checksum() -> None:
    values = torch.randn(2**17)
    blocks = torch.cat([values[2**16 :], values[: 2**16]])  # in another order
    shifted = values.roll(1)
    rows = torch.stack([values, blocks, shifted, values.flip(0), -values])
    assert len(set(_checksums(rows).tolist())) == len(rows)


# --------------------------------------------------------------------------------------------------
# in training


class Head(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = SmallNet()
        freeze(self.net.features)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def on_train_epoch_start(self) -> None:
        self.net.features.eval()

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.head.parameters(), lr=0.1)


def test_the_monitor_keeps_what_a_frozen_backbone_makes_of_the_probe(tmp_path: Any) -> None:
    data = TensorDataset(torch.rand(8, 3, 24, 24), torch.arange(8) % 5)
    monitor = ExplanationMonitor(GradCAM(), metrics=False, probe=4)
    counted: list[int] = []

    class Count(pl.Callback):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            counted.append(monitor._frozen.reused)

    class Module(Head):
        def validation_step(self, batch: Any, index: int) -> None:
            self(batch[0])

    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=[monitor, Count()],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Module(), DataLoader(data, batch_size=4), DataLoader(data, batch_size=4))
    # Before training the backbone is in train mode, but not yet changed; each epoch then begins at
    # the cut for the predictions of 4 pictures and for their maps.
    assert counted == [8, 16, 24]
