"""Which layer is found, and with which cells, in the families of networks that people train."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torchvision
from conftest import SmallNet, assert_same, snapshot
from torch import Tensor, nn

from lightning_aop import GradCAM, HiResCAM
from lightning_aop.model.isolation import undisturbed
from lightning_aop.model.layers import TargetLayerError, find_feature_map
from lightning_aop.model.passes import count_evaluations


class Row(NamedTuple):
    name: str
    size: tuple[int, int]
    layer: str
    grid: tuple[int, int]
    settings: dict[str, Any] = {}  # noqa: RUF012


TIMM = [
    # Convolutions.
    Row("resnet18", (224, 224), "layer4.1.act2", (7, 7)),
    Row("resnet26", (96, 160), "layer4.1.act3", (3, 5)),
    Row("resnetv2_50", (128, 128), "norm.act", (4, 4)),
    Row("repvgg_a0", (224, 224), "stages.3.0.act", (7, 7)),
    Row("vgg11", (64, 64), "features.20", (2, 2)),
    Row("convnextv2_atto", (96, 160), "stages.3.blocks.1", (3, 5)),
    Row("efficientnet_b0", (224, 224), "bn2.act", (7, 7)),
    Row("ghostnet_100", (224, 224), "blocks.9.0.bn1.act", (7, 7)),
    Row("inception_next_atto", (224, 224), "stages.3.blocks.1", (7, 7)),
    Row("mambaout_femto", (224, 224), "stages.3.blocks.2", (7, 7)),
    Row("starnet_s1", (224, 224), "norm", (7, 7)),
    # Class tokens.
    Row("vit_tiny_patch16_224", (224, 224), "blocks.3.norm1", (14, 14), {"depth": 4}),
    Row(
        "vit_tiny_patch16_224", (128, 128), "blocks.3.norm1", (8, 8), {"img_size": 128, "depth": 4}
    ),
    Row(
        "vit_tiny_patch16_224",
        (96, 160),
        "blocks.3.norm1",
        (6, 10),
        {"img_size": (96, 160), "depth": 4},
    ),
    Row(
        "vit_tiny_patch16_224",
        (150, 100),
        "blocks.3.norm1",
        (10, 7),
        {"dynamic_img_size": True, "dynamic_img_pad": True, "depth": 4},
    ),
    Row(
        "vit_tiny_patch16_224",
        (32, 32),
        "blocks.3.norm1",
        (8, 8),
        {"img_size": 32, "patch_size": 4, "depth": 4},
    ),
    Row("deit_tiny_distilled_patch16_224", (224, 224), "blocks.3.norm1", (14, 14), {"depth": 4}),
    Row("vit_tiny_r_s16_p8_224", (224, 224), "blocks.11.norm1", (7, 7)),
    Row("pit_ti_224", (224, 224), "transformers.2.blocks.3.norm1", (7, 7)),
    Row("cait_xxs24_224", (224, 224), "blocks.3", (14, 14), {"depth": 4}),
    Row("convit_tiny", (224, 224), "blocks.11.norm1", (14, 14)),
    Row("xcit_nano_12_p16_224", (224, 224), "cls_attn_blocks.1.norm1", (14, 14)),
    Row("coat_lite_tiny", (224, 224), "serial_blocks4.1.norm1", (7, 7)),
    # Pooled tokens, and maps with the channels last.
    Row("vit_little_patch16_reg1_gap_256", (256, 256), "blocks.3", (16, 16), {"depth": 4}),
    Row("swin_tiny_patch4_window7_224", (224, 224), "norm", (7, 7), {"depths": (1, 1, 1, 1)}),
    Row("swinv2_tiny_window8_256", (256, 256), "norm", (8, 8), {"depths": (1, 1, 1, 1)}),
    Row("twins_svt_small", (224, 224), "norm", (7, 7)),
    Row("pvt_v2_b0", (96, 160), "stages.3", (3, 5)),
    Row("levit_128s", (224, 224), "stages.2.blocks.3", (4, 4)),
    Row("resmlp_12_224", (224, 224), "norm", (14, 14)),
    Row("mixer_s32_224", (224, 224), "norm", (7, 7)),
    Row("mobilevit_xxs", (256, 256), "final_conv.bn.act", (8, 8)),
    Row("edgenext_xx_small", (256, 256), "stages.3.blocks.1", (8, 8)),
    Row("poolformer_s12", (224, 224), "stages.3.blocks.1", (7, 7)),
    Row("efficientformer_l1", (224, 224), "norm", (7, 7)),
    Row("visformer_tiny", (224, 224), "norm", (7, 7)),
]


@pytest.mark.sample(12)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("row", TIMM, ids=str)
def test_families_of_timm(row: Row) -> None:
    model = timm.create_model(row.name, pretrained=False, num_classes=10, **row.settings)
    found = find_feature_map(model, torch.rand(1, 3, *row.size))
    assert (found.layer, found.grid) == (row.layer, row.grid)


class Family(NamedTuple):
    """A line of `families.tsv`: a network at some sizes, and what a person would name there.

    In the settings * stands for the size of the images, ** for the size as a list. Without a layer
    the network is to be refused for the reason given.
    """

    library: str
    name: str
    settings: str
    layer: str
    grids: str  # height x width : rows x columns
    reason: str = ""

    def model(self, size: tuple[int, int]) -> nn.Module:
        side: Any = size[0] if size[0] == size[1] else list(size)
        text = self.settings.replace('"**"', str(list(size))).replace('"*"', str(side))
        settings = json.loads(text or "{}")
        if self.library == "timm":
            made = timm.create_model(self.name, pretrained=False, num_classes=10, **settings)
        else:
            transformers = pytest.importorskip("transformers", minversion="5")
            family = self.name.partition("For")[0]
            config = getattr(transformers, f"{family}Config")(num_labels=10, **settings)
            made = getattr(transformers, self.name)(config)
        model: nn.Module = made
        return model


def families() -> list[Family]:
    lines = Path(__file__).with_name("families.tsv").read_text().splitlines()
    return [Family(*line.split("\t")) for line in lines[1:]]


def numbers(text: str) -> tuple[int, int]:
    first, second = map(int, text.split("x"))
    return first, second


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", families(), ids=lambda f: f"{f.name} {f.grids.split()[0]}")
def test_all_families(family: Family) -> None:
    for case in family.grids.split():
        size, _, grid = case.partition(":")
        torch.manual_seed(0)
        model, images = family.model(numbers(size)), torch.rand(1, 3, *numbers(size))
        if grid:
            found = find_feature_map(model, images)
            assert (size, found.layer, found.grid) == (size, family.layer, numbers(grid))
        else:
            with pytest.raises(TargetLayerError, match=r"no layer .*RISE, LIME, XRAI"):
                find_feature_map(model, images)


TOKENS = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "patch_size": 8,
}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 40, 64]}
WINDOWS = {"patch_size": 4, "embed_dim": 16, "depths": [1, 1, 2], "num_heads": [1, 2, 4]}
TRANSFORMERS = [
    Row("ViT", (64, 64), "vit.layers.2.layernorm_before", (8, 8), TOKENS),
    Row("DeiT", (64, 64), "deit.layers.2.layernorm_before", (8, 8), TOKENS),
    Row("Dinov2", (64, 64), "dinov2.layernorm", (8, 8), {**TOKENS, "image_size": 64}),
    Row("Dinov2WithRegisters", (64, 64), "dinov2_with_registers.layernorm", (8, 8), TOKENS),
    Row("Swin", (64, 64), "swin.layernorm", (4, 4), {**WINDOWS, "window_size": 4}),
    Row("Swinv2", (64, 64), "swinv2.layernorm", (4, 4), {**WINDOWS, "window_size": 4}),
    Row("PvtV2", (224, 224), "pvt_v2.encoder.layers.3.layer_norm", (7, 7), STAGES),
    Row("ConvNext", (224, 224), "convnext.encoder.stages.3.layers.0", (7, 7), STAGES),
    Row("PoolFormer", (224, 224), "norm", (7, 7), STAGES),
]


@pytest.mark.parametrize("row", TRANSFORMERS, ids=str)
def test_families_of_transformers(row: Row) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {"image_size": row.size[0], "num_labels": 10, **row.settings}
    config = getattr(transformers, f"{row.name}Config")(**settings)
    model = getattr(transformers, f"{row.name}ForImageClassification")(config)
    found = find_feature_map(model, torch.rand(1, 3, *row.size))
    assert found.grid == row.grid
    if transformers.__version__.startswith("5"):
        assert found.layer == row.layer


@pytest.mark.parametrize("fused", [True, False])
def test_fused_and_plain_attention_have_the_same_layer(fused: bool) -> None:
    timm.layers.set_fused_attn(fused)
    try:
        model = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=3)
    finally:
        timm.layers.set_fused_attn(True)
    assert find_feature_map(model, torch.rand(1, 3, 224, 224)).layer == "blocks.2.norm1"


@pytest.mark.wide
@pytest.mark.parametrize("name", ["tnt_s_legacy_patch16_224", "crossvit_tiny_240"])
def test_networks_of_two_streams_are_refused(name: str) -> None:
    model = timm.create_model(name, pretrained=False, num_classes=10)
    size = model.default_cfg["input_size"][1:]
    with pytest.raises(
        TargetLayerError, match=r"no layer .*RISE, LIME, XRAI.*target_layer.*reshape"
    ):
        find_feature_map(model, torch.rand(1, 3, *size))


def resnet18() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.resnet18(weights=None, num_classes=10)
    return model


@pytest.mark.parametrize(("size", "grid"), [(32, (2, 2)), (64, (2, 2)), (96, (3, 3))])
def test_no_map_of_a_single_cell_is_taken(size: int, grid: tuple[int, int]) -> None:
    assert find_feature_map(resnet18(), torch.rand(1, 3, size, size)).grid == grid


def test_each_size_has_its_own_layer_whatever_came_before() -> None:
    model = resnet18()
    with count_evaluations(model) as count:
        small, large = (find_feature_map(model, torch.rand(1, 3, s, s)) for s in (32, 224))
        assert find_feature_map(model, torch.rand(2, 3, 32, 32)) is small
    assert (small.layer, large.layer) == ("layer3.1", "layer4.1")
    assert count.forward == 5 + 5
    assert find_feature_map(resnet18(), torch.zeros(1, 3, 224, 224)).layer == large.layer


def test_a_map_of_two_cells_is_reported() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 8, stride=8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    with pytest.warns(
        UserWarning, match=r"map of '1' is 2 x 2 for images of 16 x 16.*larger images"
    ):
        GradCAM().explain(model, torch.rand(1, 3, 16, 16), torch.tensor([1]))


class Skipping(nn.Module):
    """A side branch that looks like a feature map, and comes last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.table = nn.Parameter(torch.randn(1, 8, 8, 8))
        self.places = nn.Identity()
        self.branch = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = x + self.branch(x) + self.places(self.table)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def test_neither_a_branch_nor_a_table_is_taken() -> None:
    assert find_feature_map(Skipping(), torch.rand(1, 3, 32, 32)).layer == "stem"


class CosineHead(nn.Module):
    """Its classifier is a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU())
        self.weight = nn.Parameter(torch.randn(5, 8))

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.linear(self.features(images).mean((2, 3)), self.weight)


def test_a_classifier_without_a_module() -> None:
    assert find_feature_map(CosineHead(), torch.rand(1, 3, 32, 32)).layer == "features.1"


def test_finding_leaves_no_trace_also_after_an_error() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=2)
    model.blocks[1].requires_grad_(False)
    images = torch.rand(1, 3, 224, 224)
    before = snapshot(model)
    find_feature_map(model, images)
    assert_same(before, snapshot(model))

    def fail(module: nn.Module, args: object) -> None:
        raise RuntimeError("in the head")

    model = CosineHead()
    model.features[1].register_forward_pre_hook(fail)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="in the head"):
        find_feature_map(model, images[:, :, :32, :32])
    assert_same(before, snapshot(model))


def test_the_layer_found_is_laid_out_as_it_was_found() -> None:
    """Of 8 x 8 patches and one class token 8 x 8 cells, with a gradient that lies along the norm's."""
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=4, depth=2
    ).eval()
    maps = HiResCAM().activation_map(model, torch.rand(2, 3, 32, 32), torch.tensor([1, 2]))
    assert maps.shape == (2, 8, 8)
    assert maps.flatten(1).any(dim=1).all()


@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.BatchNorm2d(6)])
@pytest.mark.parametrize("trained", [False, True])
def test_a_map_of_whose_cells_the_highest_counts_is_a_feature_map(norm: Any, trained: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1),
        norm(),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )
    images = torch.rand(8, 3, 32, 32)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(20 * trained):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), torch.arange(8) % 5).backward()
        optimizer.step()
    found = find_feature_map(net.eval(), images)
    assert (found.layer, found.grid) == ("4", (32, 32))


class Registers(nn.Module):
    """A vision transformer of 8 x 8 patches with tokens that stand for no place, first or last."""

    def __init__(self, first: bool, count: int, classified: bool) -> None:
        super().__init__()
        self.first, self.count, self.classified = first, count, classified
        self.embed = nn.Conv2d(3, 32, 4, 4)
        self.places = nn.Parameter(0.02 * torch.randn(1, 64, 32))
        self.others = nn.Parameter(0.02 * torch.randn(1, count, 32))
        block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 5))

    def patches(self, tokens: Tensor) -> Tensor:
        return tokens[:, self.count :] if self.first else tokens[:, :64]

    def forward(self, images: Tensor) -> Tensor:
        parts = [self.embed(images).flatten(2).mT + self.places]
        parts.insert(0 if self.first else 1, self.others.expand(len(images), -1, -1))
        tokens = self.blocks(torch.cat(parts, dim=1))
        one = tokens[:, 0 if self.first else -1]
        pooled = one if self.classified else self.patches(tokens).mean(dim=1)
        return self.head(pooled)  # type: ignore[no-any-return]


@pytest.mark.parametrize("classified", [False, True])
@pytest.mark.parametrize("count", [1, 4, 8])
@pytest.mark.parametrize("first", [False, True])
def test_tokens_that_stand_for_no_place_are_left_out(
    first: bool, count: int, classified: bool
) -> None:
    torch.manual_seed(0)
    net = Registers(first, count, classified).eval()
    images, targets = torch.rand(3, 3, 32, 32), torch.tensor([1, 2, 4])
    found = find_feature_map(net, images)
    assert found.grid == (8, 8)
    by_hand = GradCAM(
        found.layer, reshape=lambda tokens: net.patches(tokens).mT.unflatten(2, (8, 8))
    )
    expected = by_hand.activation_map(net, images, targets)
    torch.testing.assert_close(GradCAM().activation_map(net, images, targets), expected)


class Several(nn.Module):
    """Runs one block on the image and its mirror image, or on its own output."""

    def __init__(self, mirrored: bool) -> None:
        super().__init__()
        self.mirrored = mirrored
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = self.block(x) + self.block(x.flip(-1)) if self.mirrored else self.block(self.block(x))
        return self.head(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def test_a_layer_that_looks_at_several_images_is_told_of(recwarn: Any) -> None:
    images, targets = torch.rand(3, 3, 16, 16), torch.tensor([1, 2, 4])
    GradCAM("block", eval_batch_size=2).explain(Several(mirrored=False), images, targets)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="'block' runs several times in a forward"):
        GradCAM("block").explain(Several(mirrored=True), images, targets)


def test_the_search_leaves_the_statistics_of_batches_alone() -> None:
    torch.manual_seed(0)
    net = SmallNet().eval()
    net(torch.rand(4, 3, 32, 32))
    images, targets = torch.rand(2, 3, 32, 32), torch.tensor([1, 2])
    state = {name: value.clone() for name, value in net.state_dict().items()}
    # Both in one block, at whose end alone buffers would be put back.
    with undisturbed(net):
        find_feature_map(net, images)
        assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
        assert not any(module.training for module in net.modules())
        found = GradCAM().explain(net, images, targets)
    torch.testing.assert_close(found, GradCAM("features.4").explain(net, images, targets))


def test_a_single_convolution_before_a_deep_classifier_is_its_feature_map() -> None:
    linear = [layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.ReLU())]
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Flatten(),
        *linear,
        nn.Linear(64, 5),
    )
    assert find_feature_map(net, torch.rand(1, 3, 16, 16)).layer == "2"


class Patches(nn.Module):
    """A small vision transformer of PyTorch's own layers, with the batch first or, as is their default,
    after the tokens.
    """

    def __init__(self, batch_first: bool, norm_first: bool, side: int, pooled: bool) -> None:
        super().__init__()
        self.batch_first, self.side, self.pooled = batch_first, side, pooled
        self.embed = nn.Linear(3 * side * side, 16)
        self.class_token = nn.Parameter(torch.randn(1, 1, 16))
        self.places = nn.Parameter(torch.randn(1, (16 // side) ** 2 + 1, 16))
        block = nn.TransformerEncoderLayer(
            16, 4, 32, batch_first=batch_first, norm_first=norm_first
        )
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 5))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(nn.functional.unfold(images, self.side, stride=self.side).mT)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1)
        tokens = (tokens + self.places)[:, int(self.pooled) :]
        if not self.batch_first:
            tokens = tokens.transpose(0, 1)
        tokens = self.blocks(tokens)
        if not self.batch_first:
            tokens = tokens.transpose(0, 1)
        return self.head(tokens.mean(dim=1) if self.pooled else tokens[:, 0])  # type: ignore[no-any-return]


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("side", [4, 8])
def test_tokens_after_or_before_the_batch_are_the_same_cells(
    norm_first: bool, pooled: bool, side: int
) -> None:
    """Of sides of 8 there are five tokens for the five images with which the layer is looked for."""
    torch.manual_seed(0)
    usual, other = (Patches(first, norm_first, side, pooled).eval() for first in (True, False))
    other.load_state_dict(usual.state_dict())
    images, targets = torch.rand(3, 3, 16, 16), torch.tensor([1, 2, 4])
    found, expected = find_feature_map(other, images), find_feature_map(usual, images)
    assert (found.layer, found.grid) == (expected.layer, expected.grid)
    assert found.grid == (16 // side, 16 // side)
    maps = GradCAM().activation_map(usual, images, targets)
    assert maps.flatten(1).any(dim=1).all()
    for layer in (None, found.layer):
        torch.testing.assert_close(GradCAM(layer).activation_map(other, images, targets), maps)
