"""Any module's way from images to logits: how images get in, what comes out, and what is refused."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import SmallNet, assert_same, snapshot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_aop import RISE, GradCAM, fast_sigcam, sigcam
from lightning_aop.methods.captum import CaptumAttribution
from lightning_aop.metrics.functional import deletion_curve
from lightning_aop.model import count_evaluations, predict
from lightning_aop.model.adapter import Adapted, AdapterError, find_adapter
from lightning_aop.model.layers import find_target_layer, named_layer
from lightning_aop.model.outputs import Expected, computed_from
from lightning_aop.scores import sigmoid, softmax, value

IMAGES = torch.rand(4, 3, 40, 32, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([0, 3, 1, 4])


class Form(nn.Module):
    """The small network with its logits in another form."""

    def __init__(self, form: Callable[[Tensor], Any], classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = SmallNet(classes)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.net(x))


@dataclass
class Output:
    loss: Tensor | None
    prediction: Tensor


def same_as_plain(module: nn.Module, batch: Any, plain: nn.Module) -> str:
    """Expect the maps, curves and logits of the plain network, bit for bit, and no trace."""
    before = snapshot(module)
    adapter = find_adapter(module, batch)
    model = adapter.model(module)
    for found, wanted in (
        (predict(model, IMAGES), predict(plain, IMAGES)),
        (GradCAM().explain(model, IMAGES, TARGETS), GradCAM().explain(plain, IMAGES, TARGETS)),
        (
            deletion_curve(model, IMAGES, IMAGES[:, 0], TARGETS, steps=3),
            deletion_curve(plain, IMAGES, IMAGES[:, 0], TARGETS, steps=3),
        ),
    ):
        assert torch.equal(found, wanted)
    after = snapshot(module)
    for each in (before, after):
        each["rng"] = each["rng"][:1]  # the shape checks of the tests draw numbers of Python's
    assert_same(before, after)
    return adapter.description


# --------------------------------------------------------------------------------------------------
# what comes out


@pytest.mark.parametrize(
    ("form", "where"),
    [
        (lambda z: {"logits": z, "features": z[:, :2]}, ".logits logits"),
        (lambda z: {"loss": z.sum(), "anything": z}, ".anything logits"),
        (lambda z: (z, z.exp()), "[0] logits"),
        (lambda z: [z.sum(), z], "[1] logits"),
        (lambda z: SimpleNamespace(logits=z), ".logits logits"),
        (lambda z: Output(None, z), ".prediction logits"),
        (lambda z: z[:, :, None, None], "logits"),
    ],
)
def test_logits_are_found_in_what_a_forward_gives(
    form: Callable[[Tensor], Any], where: str
) -> None:
    module = Form(form).eval()
    description = same_as_plain(module, IMAGES, module.net)
    assert description == f"forward(images) gives {where} [B, 5]"


class Heads(nn.Module):
    """Gives logits of several kinds of classes from the same features."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = SmallNet(6)
        self.colour = nn.Linear(6, 3)
        self.shape = nn.Linear(6, 5)
        self.pack = pack

    def forward(self, x: Tensor) -> Any:
        features = self.body(x)
        return self.pack(self.colour(features), self.shape(features))


def test_of_several_heads_one_is_explained_and_the_others_named() -> None:
    module = Heads(lambda colour, shape: (colour, shape)).eval()
    adapter = find_adapter(module, IMAGES)
    rest = "; of other outputs, {}, none is explained"
    assert adapter.description == f"forward(images) gives [0] logits [B, 3]{rest.format('[1]')}"
    # Labels up to class 4 fit the other alone.
    adapter = find_adapter(module, IMAGES, Expected("class", highest=4))
    assert adapter.description == f"forward(images) gives [1] logits [B, 5]{rest.format('[0]')}"
    logits = predict(adapter.model(module), IMAGES)
    assert torch.equal(logits, predict(nn.Sequential(module.body, module.shape), IMAGES))


def test_the_output_that_has_the_classes_of_the_labels_is_taken() -> None:
    def project(colour: Tensor, shape: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([shape, shape * 2], dim=1), colour

    def normalised(colour: Tensor, shape: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.normalize(shape), colour

    for pack in (project, normalised):
        module = Heads(pack).eval()
        adapter = find_adapter(module, IMAGES, Expected("class", highest=2))
        logits = predict(adapter.model(module), IMAGES)
        assert torch.equal(logits, predict(nn.Sequential(module.body, module.colour), IMAGES))
    # None of several has them all and no other: the first that has them all.
    module = Heads(project).eval()
    assert find_adapter(module, IMAGES, Expected("class", highest=1)).classes == 10


def test_of_several_outputs_and_labels_those_belong_together_that_fit() -> None:
    module = Heads(lambda colour, shape: (shape, colour)).eval()
    colours, shapes = Expected("class", highest=2), Expected("class", highest=4)
    for heads in ({"[1]": colours, "[2]": shapes}, {"[1]": shapes, "[2]": colours}):
        expected = replace(heads["[1]"], heads=heads)
        adapter = find_adapter(module, IMAGES, expected)
        assert (adapter.classes, adapter.head) == (5, next(k for k in heads if heads[k] is shapes))


def test_of_outputs_of_one_size_the_least_nested_is_that_of_the_whole_model() -> None:
    module = Heads(lambda colour, shape: ([shape * 2, shape * 3], shape)).eval()
    adapter = find_adapter(module, IMAGES, Expected("class", highest=4))
    logits = predict(adapter.model(module), IMAGES)
    assert torch.equal(logits, predict(nn.Sequential(module.body, module.shape), IMAGES))


class Calibrated(nn.Module):
    """Has another layer for its outputs, which the forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SmallNet(5)
        self.calibration = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.net(x)
        return output


def test_as_many_outputs_as_classes_are_no_features() -> None:
    module = Calibrated().eval()
    adapter = find_adapter(module, IMAGES, Expected("class", highest=4))
    assert torch.equal(predict(adapter.model(module), IMAGES), predict(module.net, IMAGES))
    # Without labels that say so they may be.
    for expected in (Expected(), Expected("class", highest=2)):
        with pytest.raises(AdapterError, match=r"'calibration' seems to take for features"):
            find_adapter(module, IMAGES, expected)


def test_a_plain_module_stays_itself() -> None:
    module = SmallNet()
    adapter = find_adapter(module, IMAGES)
    assert adapter.plain
    assert adapter.model(module) is module
    assert adapter.score is softmax
    assert adapter.description == "forward(images) gives logits [B, 5]"


@pytest.mark.parametrize("form", [lambda z: z, lambda z: z[:, 0], lambda z: z.squeeze()])
@pytest.mark.parametrize("count", [1, 4])
def test_one_logit_is_a_classifier_of_two(form: Callable[[Tensor], Any], count: int) -> None:
    module = Form(form, classes=1).eval()
    adapter = find_adapter(module, IMAGES[:count])
    assert adapter.score is sigmoid
    z = module.net(IMAGES)[:, 0]
    logits = predict(adapter.model(module), IMAGES)
    assert torch.equal(logits, torch.stack([-z, z], dim=1))
    zeros = torch.zeros(4, dtype=torch.long)
    torch.testing.assert_close(sigmoid(logits, zeros) + sigmoid(logits, zeros + 1), torch.ones(4))


class Scaled(nn.Module):
    """Takes what a step has scaled, put in order, and no bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SmallNet()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_what_steps_do_to_images_is_done_for_them(channels_last: bool, as_bytes: bool) -> None:
    images = (IMAGES * 255).byte() if as_bytes else IMAGES
    plain = images.float() / 255 if as_bytes else images
    batch = (images.permute(0, 2, 3, 1) if channels_last else images, TARGETS)
    module = Scaled().eval()
    adapter = find_adapter(module, batch)
    torch.testing.assert_close(
        predict(adapter.model(module), plain), predict(module.net, plain), atol=1e-6, rtol=1e-6
    )
    made = "images" + ".permute(0, 3, 1, 2)" * channels_last + ".float() / 255" * as_bytes
    assert adapter.description.startswith(f"forward({made})")


def test_probabilities_are_turned_into_logits() -> None:
    z = predict(SmallNet(), IMAGES)
    for form, score, wanted in (
        (lambda z: z.softmax(1), softmax, z.softmax(1)),
        (lambda z: z.log_softmax(1), softmax, z.softmax(1)),
        (lambda z: z.sigmoid(), sigmoid, z.sigmoid()),
    ):
        module = Form(form)
        wanted = score(predict(module.net, IMAGES), TARGETS)
        adapter = find_adapter(module, IMAGES)
        assert adapter.score is score
        assert "probabilities" in adapter.description
        found = adapter.score(predict(adapter.model(module), IMAGES), TARGETS)
        torch.testing.assert_close(found, wanted)
    module = Form(lambda z: z.sigmoid()[:, 0], classes=1)
    adapter = find_adapter(module, IMAGES)
    assert "the probability of class 1" in adapter.description
    torch.testing.assert_close(
        predict(adapter.model(module), IMAGES)[:, 1], predict(module.net, IMAGES)[:, 0]
    )


def test_numbers_in_0_1_that_end_in_no_sigmoid_are_logits() -> None:
    module = Form(lambda z: z.clamp(0, 0.3), classes=1)
    assert "the logit of class 1" in find_adapter(module, IMAGES).description


def test_the_labels_say_what_an_output_is() -> None:
    one = SmallNet(1)
    for expected in (Expected("value"), Expected("class", highest=7)):
        adapter = find_adapter(one, IMAGES, expected)
        assert (adapter.score, adapter.classes, adapter.names) == (value, 2, ["more", "less"])
        predicted = predict(one, IMAGES)
        assert torch.equal(
            predict(adapter.model(one), IMAGES), torch.cat([predicted, -predicted], dim=1)
        )
    many = SmallNet()
    for expected, score in (
        (Expected("multi-hot", 4), sigmoid),
        (Expected("one-hot", 4), softmax),
        (Expected("one-hot", 4, separately=True), sigmoid),
        (Expected("boxes", 4, classes=6, separately=True), sigmoid),
        (Expected("value"), value),
        (Expected(separately=True), sigmoid),
    ):
        assert find_adapter(many, IMAGES, expected).score is score


def test_a_segmentation_is_scored_by_the_mean_probability_of_a_class() -> None:
    module = nn.Conv2d(3, 6, 1)
    adapter = find_adapter(module, IMAGES)
    assert "semantic segmentation" in adapter.description
    scores = predict(adapter.model(module), IMAGES).softmax(dim=1)
    torch.testing.assert_close(scores, module(IMAGES).softmax(dim=1).mean(dim=(2, 3)))
    binary = nn.Conv2d(3, 1, 1)
    adapter = find_adapter(binary, IMAGES)
    scores = adapter.score(predict(adapter.model(binary), IMAGES), torch.ones(4).long())
    torch.testing.assert_close(scores, binary(IMAGES).sigmoid().mean(dim=(1, 2, 3)))


AUTOENCODER, GRID = r"shape of the images, as an autoencoder does", r"a grid of predictions"
PIXELS, TOKENS = r"values for each pixel", r"neither \[B, K\] nor \[B, K, H, W\], but may be tokens"
LIKE_IMAGES = nn.Conv2d(3, 3, 1)


@pytest.mark.parametrize(
    ("module", "expected", "words"),
    [
        (LIKE_IMAGES, Expected("class", 2), AUTOENCODER),
        (LIKE_IMAGES, Expected(values=True), AUTOENCODER),
        (LIKE_IMAGES, Expected(), AUTOENCODER),
        (nn.Conv2d(3, 1, 1), Expected(pixels=True), PIXELS),
        (nn.Conv2d(3, 4, 1), Expected(values=True), PIXELS),
        (nn.Sequential(nn.Upsample(scale_factor=2), LIKE_IMAGES), Expected(pixels=True), PIXELS),
        (nn.Conv2d(3, 1, 1), Expected("value"), PIXELS),
        (nn.Conv2d(3, 25, 1, 4), Expected("boxes", 2, 3), GRID),
        (nn.Conv2d(3, 4, 1), Expected("class", 7), r"4 outputs an image, .* up to class 7"),
        (nn.Sequential(nn.Conv2d(3, 32, 2, 2), nn.Flatten(2)), Expected("class", 1), TOKENS),
        (nn.Sequential(nn.Conv2d(3, 25, 2, 2), nn.Flatten(2)), Expected("boxes", 1), TOKENS),
        (nn.Sequential(nn.Conv2d(3, 32, 2, 2), nn.Flatten(2)), Expected("mask", 1), TOKENS),
    ],
)
def test_maps_that_are_no_segmentation_are_refused(
    module: nn.Module, expected: Expected, words: str
) -> None:
    with pytest.raises(AdapterError, match=rf"{words}.*logits="):
        find_adapter(module, IMAGES, expected)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (LIKE_IMAGES, Expected("mask", 2)),
        (LIKE_IMAGES, Expected("mask", 2, values=True)),
        (LIKE_IMAGES, Expected("class", 2, 3)),
        (nn.Conv2d(3, 4, 1, 2), Expected("class", 3)),  # as in learning from labels of images
        (nn.Conv2d(3, 4, 1), Expected("boxes", 2, 4)),
        (nn.Sequential(nn.Conv2d(3, 1, 2, 2), nn.Flatten(1, 2)), Expected("mask", 1)),
        (nn.Sequential(nn.Conv2d(3, 1, 1), nn.Flatten(1, 2)), Expected()),
    ],
)
def test_maps_that_may_be_a_segmentation_are_taken(module: nn.Module, expected: Expected) -> None:
    assert "semantic segmentation" in find_adapter(module, IMAGES, expected).description


class Variational(nn.Module):
    """Gives the images again, and beside them the mean and the variance of what they are made of."""

    def __init__(self, form: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.encoder, self.decoder = SmallNet(12), nn.Linear(6, 3 * 40 * 32)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        mean, variance = self.encoder(x).chunk(2, dim=1)
        return self.form(self.decoder(mean), mean, variance)


@pytest.mark.parametrize(
    "labels", [Expected("class", 4), Expected("class", 4, values=True), Expected()]
)
@pytest.mark.parametrize(
    ("form", "part"),
    [
        (lambda again, mean, variance: (again.view(-1, 3, 40, 32), mean, variance), "[0]"),
        (lambda again, mean, variance: (mean, variance, again.view(-1, 3, 40, 32)), "[2]"),
        (lambda again, mean, variance: (again, mean, variance), "[0].view_as(images)"),
        (lambda again, mean, variance: {"mu": mean, "again": again}, "['again'].view_as(images)"),
        (lambda again, mean, variance: SimpleNamespace(z=mean, x=again), ".x.view_as(images)"),
        (lambda again, mean, variance: again, ".view_as(images)"),
    ],
)
def test_what_images_are_made_again_from_is_not_taken_for_classes(
    form: Callable[[Tensor, Tensor, Tensor], Any], part: str, labels: Expected
) -> None:
    module = Variational(form).eval()
    with pytest.raises(AdapterError, match="of the images, as an autoencoder does") as caught:
        find_adapter(module, IMAGES, labels)
    named = re.search(r"logits=(lambda module, images: [^;]*);", str(caught.value))
    assert named is not None
    assert part in named[1]
    assert find_adapter(module, IMAGES, replace(labels, values=True), eval(named[1])).score is value


def test_classes_are_told_from_what_images_are_made_again_from() -> None:
    head = nn.Linear(6, 5)
    module = Variational(lambda again, mean, variance: (again, mean, variance, head(mean))).eval()
    assert "[3] logits [B, 5]" in find_adapter(module, IMAGES, Expected("class", 4)).description


def test_the_way_that_a_refusal_names_is_taken() -> None:
    values = Expected(values=True)
    with pytest.raises(AdapterError) as caught:
        find_adapter(LIKE_IMAGES, IMAGES, values)
    named = re.findall(
        r"logits=(lambda module, images: [^;]*[^;.])(?:; |\. Set)", str(caught.value)
    )
    alike, classes = [eval(each) for each in named]
    assert find_adapter(LIKE_IMAGES, IMAGES, values, alike).score is value
    assert "segmentation" in find_adapter(LIKE_IMAGES, IMAGES, values, classes).description


class Detector(nn.Module):
    """Gives two boxes for each image, as torchvision's detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SmallNet(2)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        scores = self.net(torch.stack(images)).sigmoid()
        return [
            {"boxes": torch.zeros(3, 4), "labels": torch.tensor([1, 3, 1]), "scores": s[[0, 1, 1]]}
            for s in scores
        ]


def test_a_detection_is_scored_by_the_best_box_of_a_class() -> None:
    module = Detector()
    batch = (list(IMAGES), [{"labels": torch.tensor([1, 3])}] * 4)
    adapter = find_adapter(module, batch, Expected(classes=5))
    assert adapter.classes == 5
    logits = predict(adapter.model(module), IMAGES)
    wanted = predict(module.net, IMAGES).sigmoid()
    torch.testing.assert_close(logits[:, 1].sigmoid(), wanted.amax(dim=1))
    torch.testing.assert_close(logits[:, 3].sigmoid(), wanted[:, 1])
    assert logits[:, [0, 2, 4]].sigmoid().max() < 1e-6
    ones = torch.ones(4, dtype=torch.long)
    maps = GradCAM("net.features.0").explain(adapter.model(module), IMAGES, ones)
    assert maps.isfinite().all()


def test_images_without_a_box_have_a_score_of_0_and_a_gradient_of_0() -> None:
    class Finds(Detector):
        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            return [
                {name: value[found["scores"] > 2] for name, value in found.items()}
                for found in super().forward(images)
            ]

    module = Finds()
    batch = (list(IMAGES), [{"labels": torch.tensor([1, 3])}] * 4)
    model = find_adapter(module, batch, Expected(classes=5)).model(module)
    assert predict(model, IMAGES).sigmoid().max() < 1e-6
    ones = torch.ones(4, dtype=torch.long)
    assert not GradCAM("net.features.0").explain(model, IMAGES, ones).any()


class Queries(nn.Module):
    """Gives class logits [B, Q, K] for queries, as transformers that detect do."""

    def __init__(self, outputs: int, beside: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = SmallNet(6 * outputs)
        self.beside = beside

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.net(x).unflatten(1, (6, -1))
        return {"loss": logits.sum(), "pred_logits": logits, self.beside: torch.rand(len(x), 6, 4)}


@pytest.mark.parametrize("beside", ["pred_boxes", "pred_masks"])
def test_queries_are_scored_by_the_best_one(beside: str) -> None:
    module = Queries(4, beside).eval()
    logits = module(IMAGES)["pred_logits"]
    adapter = find_adapter(module, IMAGES, Expected("boxes", highest=1, classes=3))
    assert (adapter.classes, adapter.score) == (3, sigmoid)
    wanted = logits.softmax(2)[..., :3].amax(dim=1)  # the last output is for no object
    torch.testing.assert_close(predict(adapter.model(module), IMAGES).sigmoid(), wanted)
    adapter = find_adapter(module, IMAGES, Expected("boxes", highest=1, classes=4))
    wanted = logits.sigmoid().amax(dim=1)
    torch.testing.assert_close(predict(adapter.model(module), IMAGES).sigmoid(), wanted)
    with pytest.raises(AdapterError, match=r"gives 3 outputs .*labels go up to class 7"):
        find_adapter(module, IMAGES, Expected("boxes", highest=7))


class Features(nn.Module):
    def __init__(self, first: bool) -> None:
        super().__init__()
        self.net = SmallNet()
        self.first = first

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.net.features(x).mean(dim=(2, 3))
        logits = self.net.head(features)
        return (features, logits) if self.first else (logits, features)


@pytest.mark.parametrize("first", [True, False])
def test_logits_are_what_is_computed_from_features(first: bool) -> None:
    adapter = find_adapter(Features(first).eval(), IMAGES)
    assert adapter.description == f"forward(images) gives [{int(first)}] logits [B, 5]"


def test_embeddings_are_refused_with_the_score_to_give() -> None:
    for module, expected in (
        (Form(lambda z: nn.functional.normalize(z)), Expected("class", 3)),
        (Form(lambda z: {"embedding": z}), Expected("class", 3)),
        (SmallNet(), Expected("class", 3, embeddings=True)),
    ):
        with pytest.raises(AdapterError, match=r"an embedding, which has no class.*cosine_similar"):
            find_adapter(module.eval(), IMAGES, expected)
    net = SmallNet().eval()
    reference = torch.rand(1, 5)
    adapter = find_adapter(
        net,
        IMAGES,
        Expected("class", 3, embeddings=True),
        lambda m, x: torch.cosine_similarity(m(x), reference)[:, None],
    )
    assert adapter.score is value
    like = torch.cosine_similarity(predict(net, IMAGES), reference)
    torch.testing.assert_close(predict(adapter.model(net), IMAGES)[:, 0], like)


# --------------------------------------------------------------------------------------------------
# how images get in


class Takes(nn.Module):
    """The small network behind a forward that takes something else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = SmallNet()


class Keyword(Takes):
    def forward(self, mask: Any = None, pixel_values: Any = None, labels: Any = None) -> Tensor:
        assert mask is None
        assert labels is None
        logits: Tensor = self.net(pixel_values)
        return logits


class WholeBatch(Takes):
    def forward(self, batch: Any) -> Tensor:
        logits: Tensor = self.net(batch["image"])
        return logits


class Named(Takes):
    def forward(self, **inputs: Any) -> Tensor:
        assert inputs["labels"] is not None
        logits: Tensor = self.net(inputs["pixel_values"])
        return logits


class Inner(Takes):
    def forward(self, sample: Any) -> Tensor:
        logits: Tensor = self.net(sample[0].images)
        return logits


class Pair(Takes):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.net(x)
        return nn.functional.cross_entropy(logits, y), logits


class WithTable(Takes):
    def forward(self, img: Tensor, tab: Tensor) -> Tensor:
        assert tab.shape == (len(img), 2)
        logits: Tensor = self.net(img)
        return logits


class Twins(Takes):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        assert a.shape == b.shape
        logits: Tensor = self.net(a)
        return logits


class OfTuple(Takes):
    def forward(self, x: Any) -> Tensor:
        images, table = x
        assert table.shape == (len(images), 2)
        logits: Tensor = self.net(images)
        return logits


class OfDictionary(Takes):
    def forward(self, inputs: Any) -> Tensor:
        logits: Tensor = self.net(inputs["image"])
        return logits


class NoForward(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = SmallNet()
        self.metric = nn.Identity()


class BodyAndHead(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        net = SmallNet()
        self.head = net.head
        self.backbone = nn.Sequential(net.features, nn.AdaptiveAvgPool2d(1))


@dataclass(frozen=True)
class Photos:
    images: Any


TABLE = torch.rand(4, 2)


@pytest.mark.parametrize(
    ("module", "batch", "words"),
    [
        (Keyword(), {"pixel_values": IMAGES, "labels": TARGETS}, "forward(pixel_values=images)"),
        (Named(), {"pixel_values": IMAGES, "labels": TARGETS}, "forward(**batch)"),
        (WholeBatch(), {"image": IMAGES, "name": list("abcd")}, "forward(batch)"),
        (Inner(), [Photos(IMAGES), TARGETS], "forward(batch)"),
        (Pair(), (IMAGES, TARGETS), "forward(x, y) of the batch"),
        (Pair(), {"y": TARGETS, "x": IMAGES}, "forward(x=images, y of the batch)"),
        (NoForward(), (IMAGES, TARGETS), "model(images)"),
        (WithTable(), [[IMAGES, TABLE], TARGETS], "forward(img, tab) of batch[0]"),
        (WithTable(), [TARGETS, IMAGES, TABLE], "forward(img, tab) of the batch[1:]"),
        (WithTable(), {"x": IMAGES, "features": TABLE, "y": TARGETS}, "forward(img, tab) of the"),
        (
            WithTable(),
            ({"img": IMAGES, "tab": TABLE}, TARGETS),
            "forward(img=images, tab of batch[0]",
        ),
        (Twins(), ((IMAGES, IMAGES.flip(0)), TARGETS), "forward(a, b) of batch[0]"),
        (OfTuple(), ([IMAGES, TABLE], TARGETS), "forward(batch[0])"),
        (OfDictionary(), {"inputs": {"image": IMAGES}, "y": TARGETS}, "forward(batch['inputs'])"),
        (OfDictionary(), ({"image": IMAGES}, TARGETS), "forward(batch[0])"),
        (Named(), ({"pixel_values": IMAGES, "labels": TARGETS}, 7), "forward(**batch[0])"),
        (WithTable(), Photos((IMAGES, TABLE)), "forward(img, tab) of batch.images"),
    ],
)
def test_images_get_in(module: nn.Module, batch: Any, words: str) -> None:
    module.eval()
    plain = module.model if isinstance(module, NoForward) else module.net
    assert isinstance(plain, nn.Module)
    assert same_as_plain(module, batch, plain).startswith(words)


def test_a_layer_without_its_weights_yet_gives_logits_and_stays_so() -> None:
    module = SmallNet()
    module.head = nn.LazyLinear(5)
    images = torch.rand(2, 3, 24, 24)
    adapter = find_adapter(module, images)
    assert adapter.classes == 5
    assert type(module.head) is nn.LazyLinear
    module(images)
    module.eval()
    assert torch.equal(adapter(module, images), module(images))


def test_a_backbone_and_a_head() -> None:
    module = BodyAndHead().eval()
    adapter = find_adapter(module, (IMAGES, TARGETS))
    assert adapter.description.startswith("head(backbone(images))")
    torch.manual_seed(0)
    torch.testing.assert_close(predict(adapter.model(module), IMAGES), predict(SmallNet(), IMAGES))


class Scales(Takes):
    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        logits: Tensor = self.net(x.float() / 255)
        return logits


class ScalesBytesOnly(Takes):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x.float() / 255 if x.dtype == torch.uint8 else x)
        return logits


def test_bytes_and_channels_last() -> None:
    pixels = (IMAGES * 255).to(torch.uint8)
    images = pixels.float() / 255
    module = Scales().eval()
    adapter = find_adapter(module, pixels.permute(0, 2, 3, 1))
    assert "with uint8 channels-last images" in adapter.description
    assert torch.equal(predict(adapter.model(module), images), predict(module.net, images))
    picky = ScalesBytesOnly().eval()
    adapter = find_adapter(picky, pixels)
    assert torch.equal(predict(adapter.model(picky), images), predict(picky.net, images))


def test_images_without_a_channel() -> None:
    class Grey(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = SmallNet(channels=1)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.net(x[:, None])
            return logits

    module, images = Grey().eval(), torch.rand(6, 28, 28)
    adapter = find_adapter(module, (images, torch.arange(6) % 5))
    assert "channelless images" in adapter.description
    found = predict(adapter.model(module), images[:, None])
    assert torch.equal(found, predict(module.net, images[:, None]))


class WithFacts(Takes):
    def forward(self, image: Tensor, age: Tensor) -> Tensor:
        logits: Tensor = self.net(image) + age[:, None]
        return logits


def test_other_inputs_are_those_of_the_image_that_is_perturbed() -> None:
    module = WithFacts().eval()
    age = torch.tensor([1.0, 2.0, 3.0, 4.0])
    adapter = find_adapter(module, {"image": IMAGES, "age": age})
    rows = torch.tensor([2, 2, 0, 3, 1, 1])
    seen = IMAGES[rows].clone()
    seen[:, :, :20] = 0
    found = predict(adapter.model(module), seen)
    torch.testing.assert_close(found, predict(module.net, seen) + age[rows, None])


def test_other_inputs_of_a_part_are_those_of_the_image_that_is_perturbed() -> None:
    module = WithFacts().eval()
    age = torch.tensor([1.0, 2.0, 3.0, 4.0])
    rows = torch.tensor([2, 2, 0, 3, 1, 1])
    for batch in (
        ((IMAGES, age), TARGETS),
        (TARGETS, IMAGES, age),
        [TARGETS, {"a": IMAGES, "b": age}],
    ):
        adapter = find_adapter(module, batch)
        found = predict(adapter.model(module), IMAGES[rows])
        torch.testing.assert_close(found, predict(module.net, IMAGES[rows]) + age[rows, None])


def test_the_users_own_way_comes_first() -> None:
    module = BodyAndHead().eval()
    adapter = find_adapter(
        module, IMAGES, logits=lambda m, x: m.get_submodule("backbone")(x).flatten(1)
    )
    assert adapter.classes == 12
    assert adapter.description == "logits=fn gives logits [B, 12]"
    with pytest.raises(
        AdapterError, match=r"logits=fn gives a dict, .*must return logits \[B, K\]"
    ):
        find_adapter(module, IMAGES, logits=lambda m, x: {})  # type: ignore[arg-type, return-value]


# --------------------------------------------------------------------------------------------------
# forwards that stand in the way of gradients, or of the search


def under_no_grad(net: SmallNet, x: Tensor) -> Tensor:
    with torch.no_grad():
        features = net.features(x)
    logits: Tensor = net.head(features.mean(dim=(2, 3)))
    return logits


def detached(net: SmallNet, x: Tensor) -> Tensor:
    logits: Tensor = net.head(net.features(x).detach().mean(dim=(2, 3)))
    return logits


def without_data(net: SmallNet, x: Tensor) -> Tensor:
    logits: Tensor = net.head(net.features(x).data.mean(dim=(2, 3)))
    return logits


def in_inference_mode(net: SmallNet, x: Tensor) -> Tensor:
    with torch.inference_mode():
        features = net.features(x)
    logits: Tensor = net.head(features.clone().mean(dim=(2, 3)))
    return logits


def checkpointed(net: SmallNet, x: Tensor) -> Tensor:
    logits: Tensor = net.head(checkpoint(net.features, x, use_reentrant=True).mean(dim=(2, 3)))
    return logits


def scaled_in_place(net: SmallNet, x: Tensor) -> Tensor:
    x -= 0.25
    logits: Tensor = net(x.mul_(2))
    return logits


def of_its_range_alone(net: SmallNet, x: Tensor) -> Tensor:
    if x.min() < 0 or x.max() > 1:
        raise ValueError("images lie in [0, 1]")
    logits: Tensor = net(x)
    return logits


class Calls(nn.Module):
    """The small network, called by a function."""

    def __init__(self, call: Callable[[SmallNet, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = SmallNet()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.net, x)


@pytest.mark.parametrize(
    ("call", "plain"),
    [
        (under_no_grad, None),
        (detached, None),
        (in_inference_mode, None),
        (without_data, None),
        (torch.no_grad()(lambda net, x: net(x)), None),
        (checkpointed, None),
        (scaled_in_place, lambda net, x: net((x - 0.25) * 2)),
        (of_its_range_alone, None),
    ],
)
def test_what_stands_in_the_way_of_gradients_is_gone_round(
    call: Callable[[SmallNet, Tensor], Tensor],
    plain: Callable[[SmallNet, Tensor], Tensor] | None,
) -> None:
    module, wanted = Calls(call).eval(), Calls(plain or (lambda net, x: net(x))).eval()
    words = same_as_plain(module, IMAGES, wanted)
    kept = ", with gradients where it computes none," * (call not in _WITH_GRADIENTS)
    assert words == f"forward(images){kept} gives logits [B, 5]"
    if kept:  # nothing of it is left in training
        assert not computed_from(module(images := IMAGES.clone().requires_grad_().clone()), images)


_WITH_GRADIENTS = (checkpointed, scaled_in_place, of_its_range_alone)


def test_a_stopped_gradient_beside_others_stays_stopped() -> None:
    def half(net: SmallNet, x: Tensor) -> Tensor:
        logits: Tensor = net(x + 0.5 * (x.detach() - x))  # a gradient of one half
        return logits

    module, wanted = Calls(half).eval(), Calls(lambda net, x: net(x)).eval()
    adapter = find_adapter(module, IMAGES)
    assert adapter.plain
    x = IMAGES.clone().requires_grad_()
    (found,) = torch.autograd.grad(adapter(module, x).sum(), x)
    (whole,) = torch.autograd.grad(wanted(x).sum(), x)
    torch.testing.assert_close(found, whole / 2)


def test_a_forward_without_any_gradient_is_told_as_such() -> None:
    def outside(net: SmallNet, x: Tensor) -> Tensor:
        return torch.from_numpy(net(x).detach().numpy())

    module, wanted = Calls(outside).eval(), Calls(lambda net, x: net(x)).eval()
    model = find_adapter(module, IMAGES).model(module)
    for method in (fast_sigcam(), sigcam()):
        with pytest.raises(ValueError, match=r"Calls has no gradient from .*: use a method that"):
            method.explain(model, IMAGES, TARGETS)
    found = RISE(masks=8).explain(model, IMAGES, TARGETS)
    assert torch.equal(found, RISE(masks=8).explain(wanted, IMAGES, TARGETS))


def test_a_norm_by_the_batch_is_not_tried_on_one_image() -> None:
    class Normalises(Takes):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(5, track_running_stats=False)

        def forward(self, x: Tensor) -> Tensor:
            normalised: Tensor = self.norm(self.net(x))
            return normalised

    module = Normalises().eval()
    assert torch.equal(predict(find_adapter(module, IMAGES).model(module), IMAGES), module(IMAGES))


def test_tables_made_in_inference_mode_have_gradients() -> None:
    class Remembers(Takes):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "table"):
                self.table = [torch.linspace(0.5, 1.5, x.shape[-1])]
            logits: Tensor = self.net(x * self.table[0])
            return logits

    module, wanted = Remembers().eval(), Remembers().eval()
    wanted(IMAGES)
    with torch.inference_mode():
        module(IMAGES)
        table = module.table[0]
        found = GradCAM().explain(module, IMAGES, TARGETS)
    assert torch.equal(found, GradCAM().explain(wanted, IMAGES, TARGETS))
    assert module.table[0] is table


# --------------------------------------------------------------------------------------------------
# a model like any other


def test_layers_have_the_names_of_the_users_module() -> None:
    module = Form(lambda z: {"logits": z}).eval()
    model = find_adapter(module, IMAGES).model(module)
    assert isinstance(model, Adapted)
    assert dict(model.named_modules()) == dict(module.named_modules())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in module.named_parameters()]
    assert find_target_layer(model, IMAGES) == find_target_layer(module.net, IMAGES).join(
        ["net.", ""]
    )
    assert named_layer(model, module.net.features[0])[0] == "net.features.0"
    layer = GradCAM("net.features.0").explain(model, IMAGES, TARGETS)
    assert torch.equal(layer, GradCAM("features.0").explain(module.net, IMAGES, TARGETS))
    method = CaptumAttribution("GuidedBackprop")
    assert torch.equal(
        method.explain(model, IMAGES, TARGETS), method.explain(module.net, IMAGES, TARGETS)
    )


@pytest.mark.parametrize("form", [lambda z: {"logits": z}, lambda z: (z.sum(), z), lambda z: [z]])
def test_evaluations_are_counted(form: Callable[[Tensor], Any]) -> None:
    module = Form(form).eval()
    model = find_adapter(module, IMAGES).model(module)
    GradCAM().explain(model, IMAGES, TARGETS)
    with count_evaluations(model) as count:
        GradCAM().explain(model, IMAGES, TARGETS)
    assert (count.forward, count.backward) == (4, 4)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_evaluations_are_counted_whatever_a_module_gives() -> None:
    scripted = torch.jit.script(SmallNet().eval())
    for module, images in (
        (Detector().eval(), list(IMAGES)),
        (Queries(4, "pred_boxes").eval(), IMAGES),
        (scripted, IMAGES),
    ):
        with count_evaluations(module) as count:
            module(images)
        assert (count.forward, count.backward) == (4, 0)


# --------------------------------------------------------------------------------------------------
# what is refused


class Embeds(Takes):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.net(x)
        return features


class Scattered(nn.Module):
    """Has a classifier of images in two of its parts, and a forward that takes words beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.text = nn.Embedding(7, 6)
        self.top = nn.Linear(6, 5)

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        logits: Tensor = self.top(self.body(images) + self.text(words))
        return logits


def test_the_example_in_a_refusal_is_one_that_works() -> None:
    module = Scattered()
    with pytest.raises(AdapterError) as refused:
        find_adapter(module, IMAGES, Expected("class", highest=4))
    code = str(refused.value).partition("such as ")[2]
    assert code == "lambda module, images: module.top(module.body(images))"
    assert find_adapter(module, IMAGES, Expected("class", highest=4), eval(code)).classes == 5
    with pytest.raises(AdapterError) as refused:  # where none does there is no example
        find_adapter(SmallNet(channels=1), IMAGES)
    assert "such as" not in str(refused.value)


def test_what_leads_to_no_logits_is_refused_in_words() -> None:
    module = Form(lambda z: {"loss": z.sum()})
    with pytest.raises(AdapterError, match=r"gives a dict \(loss: \[\]\).* Set logits=fn, a func"):
        find_adapter(module, IMAGES)
    with pytest.raises(
        AdapterError,
        match=r"5 outputs .*labels go up to class 9\. Set logits=fn.* \[B, K\]; or read_batch=fn",
    ):
        find_adapter(SmallNet(), IMAGES, Expected("class", highest=9))
    with pytest.raises(AdapterError, match=r"class 5 \(if they count from 1, set read_batch=fn"):
        find_adapter(SmallNet(), IMAGES, Expected("class", highest=5))
    with pytest.raises(AdapterError, match=r"'head' seems to take .* module.head\(module\(im"):
        find_adapter(Embeds(), IMAGES)
    with pytest.raises(AdapterError, match="gives other outputs for 2 images than for 4"):
        find_adapter(Form(lambda z: z @ z.T), IMAGES)  # how like the images are to each other
    with pytest.raises(AdapterError, match=r"raised RuntimeError: .*Set logits=fn") as refused:
        find_adapter(SmallNet(channels=1), IMAGES)
    assert "Conv2d(" not in str(refused.value)
    for batch, words in (
        (torch.rand(4, 3, 8, 8, 8), "volumes or videos"),
        ((torch.rand(4, 3, 8, 8, 8), TARGETS), "volumes or videos"),
        (torch.rand(4, 2, 100), "1-D signals"),
        ((torch.rand(4, 3, 8, 8).numpy(), [0, 1, 2, 0]), r"must be a tensor \[B, C, H, W\]"),
        ((torch.rand(4, 2, 100), TARGETS), "1-D signals"),
        ([torch.rand(3, 8, 8), torch.rand(3, 9, 8)], "several sizes"),
        # With labels, as loaders give them.
        ([torch.rand(4, 3, 8, 8, 8), torch.zeros(4)], "volumes or videos"),
        ([torch.rand(4, 2, 100), torch.zeros(4)], "1-D signals"),
        (((torch.rand(3, 8, 8), torch.rand(3, 9, 8)), torch.zeros(2)), "several sizes"),
        (((torch.rand(3, 8, 8), torch.rand(3, 9, 8)), ({}, {})), "several sizes"),
        ({"text": "a"}, r"dict with keys \['text'\]"),
    ):
        with pytest.raises(ValueError, match=f"{words}.*read_batch=fn"):
            find_adapter(SmallNet(), batch)
