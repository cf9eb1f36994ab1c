"""Weights as people have them, against the plain state_dict of the same network."""

import argparse
import functools
import gzip
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from lightning_aop.coco import MultilabelClassifier
from lightning_aop.data.networks import load_backbone, load_classifier, load_network
from lightning_aop.data.weights import read_weights
from lightning_aop.errors import FileError

ran: list[str] = []


class Settings(dict[str, Any]):
    """A kind of dictionary that torch.load does not know, like those of many configurations."""


def spring(word: str) -> str:
    ran.append(word)
    return word


class Trap:
    """Whoever makes one of these runs code."""

    def __reduce__(self) -> Any:
        return spring, ("the trap",)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Return weights of a ResNet18 with 5 classes, whose statistics and counts differ from new ones."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None, num_classes=5)
    return {
        k: v + 7 if v.dtype == torch.int64 else v + 0.1 * torch.rand_like(v)
        for k, v in network.state_dict().items()
    }


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def blank(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros_like(value) for key, value in state.items()}


FORMS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda s: s,
    "DataParallel": lambda s: under("module.", s),
    "compiled": lambda s: under("_orig_mod.", s),
    "compiled in parts": lambda s: {k.replace("layer1.", "layer1._orig_mod."): v
                                    for k, v in s.items()},
    "nested": lambda s: {"state_dict": under("model._orig_mod.module.net.", s)},
    "average alone": lambda s: {"ema": under("ema.module.", s)},
    "beside its average": lambda s: under("ema.", blank(s)) | under("encoder.", s),
    "beside its teacher": lambda s: under("teacher.", blank(s)) | under("classifier_net.", s),
    "two envelopes": lambda s: {"ema": blank(s), "model": s},
    "timm": lambda s: {"state_dict": s, "state_dict_ema": blank(s), "arch": "resnet18"},
    "reference training": lambda s: {"model": s, "optimizer": {}, "args": argparse.Namespace(lr=1)},
    "a tuple": lambda s: (s, 3),
    "a list": lambda s: [{"model": s}],
    "deep envelope": lambda s: {"weights": {"params": s}},
    "with a loss": lambda s: under("net.", s) | {"criterion.weight": torch.ones(5)},
    "sorted": lambda s: OrderedDict(sorted(s.items())),
    "reversed": lambda s: dict(reversed(s.items())),
    "parameters": lambda s: {k: nn.Parameter(v, requires_grad=v.is_floating_point())
                             for k, v in s.items()},
    "a dictionary of their own": lambda s: {"state_dict": s, "hyper_parameters": Settings(lr=1)},
    "partial": lambda s: {"state_dict": s, "hyper_parameters": {
        "optimizer": functools.partial(torch.optim.SGD, lr=1), "mean": np.ones(3)}},
    "a trap": lambda s: {"state_dict": s, "callbacks": [Trap()]},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_the_network_is_found_in_whatever_form(
    form: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(FORMS[form](state), tmp_path / "file.pth")
    network = load_network("resnet18", str(tmp_path / "file.pth"))
    found = network.state_dict()
    assert found.keys() == state.keys()
    assert [k for k in state if not torch.equal(found[k], state[k])] == []
    assert ran == []


def test_safetensors(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "model.safetensors"
    safetensors.save_file(under("model.", state), path)
    found = load_network("resnet18", str(path)).state_dict()
    assert all(torch.equal(found[k], state[k]) for k in state)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"can't be read as safetensors .*: copy or download"):
        read_weights(path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        read_weights(path)


def test_weights_that_count_no_batches(state: dict[str, Tensor], tmp_path: Path) -> None:
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")
    found = load_network("resnet18", str(tmp_path / "old.pth")).state_dict()
    assert all(torch.equal(found[k], old[k]) for k in old)


def test_timm_shares_what_has_the_same_names(state: dict[str, Tensor], tmp_path: Path) -> None:
    pytest.importorskip("timm")
    torch.save(state, tmp_path / "file.pth")
    images = torch.rand(1, 3, 64, 64)
    logits = [load_network(name, str(tmp_path / "file.pth")).eval()(images)
              for name in ("resnet18", "timm/resnet18")]  # fmt: skip
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 64),
        ("squeezenet1_1", 64),
        ("mobilenet_v3_small", 64),
        ("timm/deit_tiny_distilled_patch16_224", 224),
    ],
)
def test_a_trained_classifier_of_ours_is_read_with_its_classes(
    name: str, size: int, tmp_path: Path
) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    ours = MultilabelClassifier(name, None, num_classes=3).eval()
    ours.classes = ["ape", "bee", "cat"]
    path = tmp_path / "last.ckpt"
    checkpoint: dict[str, Any] = {"state_dict": ours.state_dict(), "epoch": 1}
    ours.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    network, classes, multilabel = load_classifier(name, str(path))
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(images), ours(images), atol=1e-5, rtol=1e-4)
        backbone, _ = load_backbone(name, str(path))
        torch.testing.assert_close(backbone.eval()(images), ours.backbone(images))
    assert classes == ["ape", "bee", "cat"]
    assert multilabel


@pytest.mark.parametrize(
    "name", ["deit_tiny_distilled_patch16_224", "levit_128s", "crossvit_9_240"]
)
def test_networks_of_several_heads_are_backbones(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    network = unlike(timm.create_model(name)).eval()
    torch.save(network.state_dict(), tmp_path / "file.pth")
    size = network.pretrained_cfg["input_size"][-1]
    images = torch.rand(2, 3, size, size)
    backbone, count = load_backbone(f"timm/{name}", str(tmp_path / "file.pth"))
    network.reset_classifier(0)
    with torch.no_grad():
        features = backbone.eval()(images)
        assert torch.equal(features, network(images))
    assert features.shape == (2, count)
    # Heads may be missing, all of them.
    torch.save(network.state_dict(), tmp_path / "headless.pth")
    backbone, _ = load_backbone(f"timm/{name}", str(tmp_path / "headless.pth"))
    with torch.no_grad():
        assert torch.equal(backbone.eval()(images), features)


LAYERS: dict[str, Callable[[Tensor, Tensor], dict[str, Tensor]]] = {
    "on a backbone": lambda w, b: {"classifier.weight": w, "classifier.bias": b},
    "in a head": lambda w, b: {"head.fc.weight": w, "head.fc.bias": b},
    "after a dropout": lambda w, b: {"backbone.fc.1.weight": w, "backbone.fc.1.bias": b},
    "with a loss's weights": lambda w, b: {
        **{"criterion.weight": torch.ones(5), "val.confmat": torch.ones(5, 5)},
        **{"head.weight": w, "head.bias": b, "ema.head.weight": w + 1, "ema.head.bias": b},
    },
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_linear_layer_beside_a_network_is_its_head(
    kind: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    """As Lightning modules have it: a backbone without its own, and a layer of another name."""
    body = {f"backbone.{k}": v for k, v in state.items() if not k.startswith("fc.")}
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": body | LAYERS[kind](state["fc.weight"], state["fc.bias"])}, path)
    found = load_network("resnet18", str(path)).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    "more",
    [
        {"head.0.weight": torch.ones(512), "head.0.bias": torch.ones(512)},
        {"head.3.weight": torch.ones(2, 5), "head.3.bias": torch.ones(2)},
        {"projector.weight": torch.ones(64, 512)},
    ],
    ids=["a norm", "a second layer", "another head"],
)
def test_a_head_of_several_layers_is_not_guessed(
    more: dict[str, Tensor], state: dict[str, Tensor], tmp_path: Path
) -> None:
    body = {f"backbone.{k}": v for k, v in state.items() if not k.startswith("fc.")}
    head = {"head.1.weight": state["fc.weight"], "head.1.bias": state["fc.bias"]}
    torch.save({"state_dict": body | head | more}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"lack the head of resnet18 \(fc.weight, fc.bias\)"):
        load_network("resnet18", str(tmp_path / "last.ckpt"))


def test_classes_without_names_are_numbered(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "file.pth")
    _, classes, multilabel = load_classifier("resnet18", str(tmp_path / "file.pth"))
    assert classes == [f"class {i}" for i in range(5)]
    assert not multilabel
    _, classes, _ = load_classifier("resnet18", None)
    assert classes[:2] == ["tench", "goldfish"]


def test_a_backbone_needs_no_head(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "headless.pth"
    torch.save({k: v for k, v in state.items() if not k.startswith("fc.")}, path)
    backbone, count = load_backbone("resnet18", str(path))
    assert count == 512
    assert torch.equal(backbone.get_parameter("conv1.weight"), state["conv1.weight"])
    with pytest.raises(ValueError, match=r"lack the head of resnet18 \(fc.weight, fc.bias\)"):
        load_network("resnet18", str(path))


def test_backbones_of_hugging_face_are_refused_with_those_that_work() -> None:
    with pytest.raises(ValueError, match=r"no backbones here: take torchvision's .* or timm/NAME"):
        load_backbone("hf/microsoft/resnet-50", None)


BAD: dict[str, tuple[Callable[[Path, Any], object], str]] = {
    "empty": (lambda p, s: p.write_bytes(b""), "the file is empty"),
    "a pointer": (
        lambda p, s: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
        "a pointer of Git LFS, not the weights; run git lfs pull",
    ),
    "a web page": (lambda p, s: p.write_text("<!doctype html><html>"), "it is a web page"),
    "text": (lambda p, s: p.write_text("no weights"), "not a file that PyTorch wrote"),
    "cut": (
        lambda p, s: (torch.save(s, p), p.write_bytes(p.read_bytes()[:-900])),
        "is cut short .*copy or download it again",
    ),
    "a pickled model": (
        lambda p, s: torch.save(torchvision.models.squeezenet1_1(), p),
        "holds a pickled object, SqueezeNet, which could run any code and is not loaded; save the",
    ),
    "a pickled model in an envelope": (
        lambda p, s: torch.save({"model": torchvision.models.squeezenet1_1(), "epoch": 3}, p),
        "holds a pickled object, SqueezeNet",
    ),
    "a program": (
        lambda p, s: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), p),
        "a TorchScript program, which is not run",
    ),
    "an exported program": (
        lambda p, s: torch.export.save(
            torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), p.with_suffix(".pt2")
        )
        or p.with_suffix(".pt2").rename(p),
        "without a state_dict, such as torch.export.save writes; save the network alone",
    ),
    "an optimizer": (
        lambda p, s: torch.save(torch.optim.SGD([torch.ones(1)], momentum=1).state_dict(), p),
        "the state of an optimizer and no network",
    ),
    "packed": (lambda p, s: p.write_bytes(gzip.compress(b"weights")), "packed by gzip.*; unpack it"),
    "HDF5": (lambda p, s: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "it is HDF5, as Keras"),
    "ONNX": (lambda p, s: p.write_bytes(b"\x08\x07\x12\x07pytorch" + bytes(99)), "it is ONNX"),
    "NumPy": (
        lambda p, s: (
            np.savez(p.with_suffix(".npz"), **{k: v.numpy() for k, v in s.items()}),
            p.with_suffix(".npz").rename(p),
        ),
        "NumPy's .npz, not weights of PyTorch",
    ),
    "a trap alone": (lambda p, s: torch.save(Trap(), p), "holds a pickled object"),
    "a list": (lambda p, s: torch.save([1, 2], p), "holds no state_dict of tensors; save the"),
    "another network": (
        lambda p, s: torch.save(torchvision.models.squeezenet1_1().state_dict(), p),
        r"no weights of resnet18: of its 122 tensors 102 are missing"
        r".*conv1.weight \[64, 3, 7, 7\] is missing"
        ".*; they fit squeezenet1_1: name the network",
    ),
    "a deeper network": (
        lambda p, s: torch.save(torchvision.models.resnet34(num_classes=5).state_dict(), p),
        r"\d\d are unknown .*layer1.2.conv1.weight is unknown.*; they fit resnet34: name",
    ),
    "a wider network": (
        lambda p, s: torch.save(s | {"conv1.weight": torch.zeros(32, 3, 7, 7)}, p),
        r"1 have another shape.*conv1.weight is \[32, 3, 7, 7\], not \[64, 3, 7, 7\].*; name the",
    ),
}  # fmt: skip


@pytest.mark.sample(6)
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.filterwarnings("ignore:The default weight initialization of")
@pytest.mark.parametrize("kind", BAD)
def test_what_holds_no_weights_says_what_it_is(
    kind: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    write, message = BAD[kind]
    write(tmp_path / "file.pth", state)
    with pytest.raises(ValueError, match=rf"weights .*file.pth.* {message}") as raised:
        load_network("resnet18", str(tmp_path / "file.pth"))
    assert len(str(raised.value)) < 500
    assert "\n" not in str(raised.value)
    assert ran == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_resnets_of_hugging_face(bottleneck: bool, prefix: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = (
        {} if bottleneck else {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2],
                               "layer_type": "basic"}
    )  # fmt: skip
    theirs = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes)).eval()
    state = dict(sorted(under(prefix, theirs.state_dict()).items()))
    torch.save(state, tmp_path / "file.pth")
    name = "resnet50" if bottleneck else "resnet18"
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        ours = load_network(name, str(tmp_path / "file.pth")).eval()(images)
        torch.testing.assert_close(ours, theirs(images).logits, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match=f"they fit {name}"):
        load_network("squeezenet1_1", str(tmp_path / "file.pth"))


@pytest.mark.filterwarnings("ignore")
def test_vision_transformers_of_three_libraries(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(num_labels=4, layer_norm_eps=1e-6)
    theirs = transformers.ViTForImageClassification(config).eval()
    torch.save(theirs.state_dict(), tmp_path / "loaded.pth")
    theirs.save_pretrained(tmp_path)  # under the names that are published
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        wanted = theirs(images).logits
        for file in ("loaded.pth", "model.safetensors"):
            for name in ("vit_b_16", "timm/vit_base_patch16_224"):
                network = load_network(name, str(tmp_path / file)).eval()
                torch.testing.assert_close(network(images), wanted, atol=1e-4, rtol=1e-3)
                torch.save(under("model.", network.state_dict()), tmp_path / f"{name[-3:]}.pth")
        for name, file in (("timm/vit_base_patch16_224", "_16"), ("vit_b_16", "224")):
            network = load_network(name, str(tmp_path / f"{file}.pth")).eval()
            torch.testing.assert_close(network(images), wanted, atol=1e-4, rtol=1e-3)
    assert timm


@pytest.mark.wide
def test_the_names_of_published_vision_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = torchvision.models.vit_b_32(num_classes=3).state_dict()
    published = {
        k.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): v
        for k, v in state.items()
    }
    assert len(published.keys() - state.keys()) == 48
    torch.save(published, tmp_path / "published.pth")
    network = load_network("vit_b_32", str(tmp_path / "published.pth"))
    # torchvision's own load_state_dict renames them alike.
    theirs = torchvision.models.vit_b_32(num_classes=3)
    theirs.load_state_dict(published)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", ["mnasnet0_5", "mnasnet1_3"])
def test_networks_that_want_a_version_number(name: str, tmp_path: Path) -> None:
    state = unlike(torchvision.models.get_model(name, num_classes=3)).state_dict()
    torch.save(under("model.", state), tmp_path / "file.pth")
    network = load_network(name, str(tmp_path / "file.pth"))
    for key, tensor in network.state_dict().items():
        assert torch.equal(state[key], tensor), key


NESTED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "EMA in an envelope": lambda s: {"ema": {"state_dict": under("module.", s), "decay": 0.9}},
    "a model's settings": lambda s: {"model": {"name": "resnet18"}, "weights": s},
    "a pickled model beside": lambda s: {"model": Settings(lr=1), "ema": {"model": s}},
    "DeepSpeed": lambda s: {"module": under("module.", s), "optimizer": None},
    "of another name": lambda s: {"epoch": 3, "generator": s, "optimizer": {
        "state": {k: {"exp_avg": v} for k, v in blank(s).items()}, "param_groups": []}},
    "teacher and mean": lambda s: {"mean": torch.zeros(3), "student_net": s},
}  # fmt: skip


@pytest.mark.parametrize("form", NESTED)
def test_envelopes_in_each_other(form: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(NESTED[form](state), tmp_path / "file.pth")
    found = load_network("resnet18", str(tmp_path / "file.pth")).state_dict()
    assert [k for k in state if not torch.equal(found[k], state[k])] == []


def test_the_content_tells_the_format(state: dict[str, Tensor], tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state, tmp_path / "pytorch_model.bin")
    torch.save(state, tmp_path / "model.safetensors")
    for name in ("pytorch_model.bin", "model.safetensors"):
        assert read_weights(tmp_path / name).tensors.keys() == state.keys()
    (tmp_path / "config.json").write_text('{"architectures": []}')
    with pytest.raises(ValueError, match=r"config.json: it is JSON, not the weights"):
        read_weights(tmp_path / "config.json")
    with pytest.raises(ValueError, match="it is a folder; name the file in it"):
        read_weights(tmp_path)


@pytest.mark.wide
def test_a_head_that_claims_too_much_takes_no_memory(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    for weight in (torch.zeros(1, 1).expand(10**9, 512), torch.zeros(()), torch.zeros(0, 512)):
        torch.save(state | {"fc.weight": weight}, tmp_path / "file.pth")
        with pytest.raises(ValueError, match=r"fc.weight is \[.*\], not \[1000, 512\]"):
            load_network("resnet18", str(tmp_path / "file.pth"))


ALIKE = [
    ("convnext_tiny", "convnext_tiny", 64),
    ("efficientnet_b0", "efficientnet_b0", 64),
    ("mobilenet_v2", "mobilenetv2_100", 64),
    ("mobilenet_v3_small", "mobilenetv3_small_100", 64),
    ("swin_t", "swin_tiny_patch4_window7_224", 224),
]


def unlike(network: nn.Module) -> nn.Module:
    """Give a network weights and statistics of which no two layers have the same."""
    torch.manual_seed(0)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            variance = name.endswith("running_var")
            value += 0.5 * torch.rand_like(value) if variance else 0.02 * torch.randn_like(value)
    return network.eval()


def alike(networks: list[nn.Module], images: Tensor) -> None:
    """Expect equal logits, with one epsilon in the normalisations: it is no part of the weights."""
    for network in networks:
        for module in network.modules():
            if hasattr(module, "eps"):
                module.eps = 1e-3
    with torch.no_grad():
        ours, theirs = (network(images) for network in networks)
    theirs = getattr(theirs, "logits", theirs)
    torch.testing.assert_close(ours / theirs.std(), theirs / theirs.std(), atol=1e-4, rtol=1e-4)


@pytest.mark.sample(1)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "theirs", "size"), ALIKE)
def test_torchvision_and_timm_read_the_weights_of_each_other(
    name: str, theirs: str, size: int, tmp_path: Path
) -> None:
    timm = pytest.importorskip("timm")
    images = torch.rand(2, 3, size, size)
    for other, network in (
        (name, timm.create_model(theirs, num_classes=7)),
        (f"timm/{theirs}", torchvision.models.get_model(name, weights=None, num_classes=7)),
    ):
        state = unlike(network).state_dict()
        torch.save(dict(sorted(under("model.", state).items())), tmp_path / "file.pth")
        alike([load_network(other, str(tmp_path / "file.pth")).eval(), network], images)
        headless = {k: v for k, v in state.items() if v.shape[:1] != (7,)}
        torch.save(headless, tmp_path / "headless.pth")
        with pytest.raises(ValueError, match=f"lack the head of {other}"):
            load_network(other, str(tmp_path / "headless.pth"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "name", "size"), [("ConvNext", "convnext_tiny", 64), ("Swin", "swin_t", 224)]
)
def test_torchvision_reads_what_hugging_face_saved(
    kind: str, name: str, size: int, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(num_labels=7)
    network = unlike(getattr(transformers, f"{kind}ForImageClassification")(config))
    torch.save(network.state_dict(), tmp_path / "loaded.pth")
    network.save_pretrained(tmp_path)  # under the names that are published
    for file in ("loaded.pth", "model.safetensors"):
        read = load_network(name, str(tmp_path / file)).eval()
        alike([read, network], torch.rand(2, 3, size, size))


@pytest.mark.wide
@pytest.mark.filterwarnings("ignore")
def test_efficientnet_v2_of_another_library_is_refused(tmp_path: Path) -> None:
    """Its BatchNorms have another epsilon, which no file of tensors tells."""
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("efficientnetv2_s").state_dict(), tmp_path / "timm.pth")
    with pytest.raises(ValueError, match=r"timm's EfficientNetV2, another .* --model timm/NAME"):
        load_network("efficientnet_v2_s", str(tmp_path / "timm.pth"))
    network = torchvision.models.get_model("efficientnet_v2_s", weights=None)
    torch.save(network.state_dict(), tmp_path / "torchvision.pth")
    with pytest.raises(ValueError, match=r"they fit .*efficientnet_v2_s"):
        load_network("timm/efficientnetv2_s", str(tmp_path / "torchvision.pth"))


@pytest.mark.filterwarnings("ignore")
def test_other_networks_of_the_same_name_say_so(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileNetV2Config(num_labels=7)
    network = transformers.MobileNetV2ForImageClassification(config)
    torch.save(network.state_dict(), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"Hugging Face's MobileNetV2, another .* --model FOLDER"):
        load_network("mobilenet_v2", str(tmp_path / "file.pth"))
    torch.save(timm.create_model("convnext_small").state_dict(), tmp_path / "file.pth")
    with pytest.raises(ValueError, match="they fit convnext_small: name the network"):
        load_network("convnext_tiny", str(tmp_path / "file.pth"))


def test_a_download_that_fails_says_how_to_do_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens
    remedy = (
        r"could not be downloaded .*: give a local file as the weights \(--weights; of fit, --model"
    )
    with pytest.raises(FileError, match=remedy):
        load_network("squeezenet1_1")
