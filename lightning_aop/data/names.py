"""Names of a network's tensors in other libraries, written as torchvision or timm writes them."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_Rules = tuple[tuple[str, str], ...]

# DenseNet's published weights are older than the ban on dots in the names of parts.
_DENSENET: _Rules = ((r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2"),)
# So are those of its ViTs than its class MLP.
_OLD_VIT: _Rules = (
    (r"(encoder_layer_\d+\.mlp)\.linear_1\.", r"\1.0."),
    (r"(encoder_layer_\d+\.mlp)\.linear_2\.", r"\1.3."),
)
# Stages and convolutions are counted from 0 there: they are marked here, and counted on below.
_HF_RESNET: _Rules = (
    (r"(?:resnet\.)?embedder\.embedder\.convolution\.", "conv1."),
    (r"(?:resnet\.)?embedder\.embedder\.normalization\.", "bn1."),
    (r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.", r"layer<\1>.\2."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    (r"\.layer\.(\d+)\.convolution\.", r".conv<\1>."),
    (r"\.layer\.(\d+)\.normalization\.", r".bn<\1>."),
    (r"(^|\.)classifier\.1\.", r"\1fc."),
)
_HF_VIT: _Rules = (
    (r"(?:vit\.)?embeddings\.cls_token$", "cls_token"),
    (r"(?:vit\.)?embeddings\.position_embeddings$", "pos_embed"),
    (r"(?:vit\.)?embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"(?:vit\.)?(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.(?:attention\.)?(q|k|v)(?:uery|ey|alue|_proj)\.", r".attn.\1."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"(^|\.)(?:vit\.)?layernorm\.", r"\1norm."),
    (r"(^|\.)classifier\.", r"\1head."),
)
_TORCHVISION_VIT: _Rules = (
    (r"(^|\.)class_token$", r"\1cls_token"),
    (r"(^|\.)encoder\.pos_embedding$", r"\1pos_embed"),
    (r"(^|\.)conv_proj\.", r"\1patch_embed.proj."),
    (r"(^|\.)encoder\.layers\.encoder_layer_(\d+)\.", r"\1blocks.\2."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"(^|\.)encoder\.ln\.", r"\1norm."),
    (r"(^|\.)heads\.head\.", r"\1head."),
)
_TIMM_VIT: _Rules = (
    (r"(^|\.)cls_token$", r"\1class_token"),
    (r"(^|\.)pos_embed$", r"\1encoder.pos_embedding"),
    (r"(^|\.)patch_embed\.proj\.", r"\1conv_proj."),
    (r"(^|\.)blocks\.(\d+)\.", r"\1encoder.layers.encoder_layer_\2."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
    (r"(^|\.)norm\.", r"\1encoder.ln."),
    (r"(^|\.)head\.", r"\1heads.head."),
)
_HF_SWIN: _Rules = (
    (r"(?:swin\.)?embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"(?:swin\.)?embeddings\.norm\.", "patch_embed.norm."),
    (r"(?:swin\.)?encoder\.layers\.", "layers."),
    (r"\.attention\.(?:self\.)?(q|k|v)(?:uery|ey|alue|_proj)\.", r".attn.\1."),
    (r"\.attention\.(?:self|relative_position_bias)\.(?=relative_position)", ".attn."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"(^|\.)(?:swin\.)?layernorm\.", r"\1norm."),
    (r"(^|\.)classifier\.", r"\1head."),
)
_HF_CONVNEXT: _Rules = (
    (r"(?:convnext\.)?embeddings\.patch_embeddings\.", "stem.0."),
    (r"(?:convnext\.)?embeddings\.layernorm\.", "stem.1."),
    (r"(?:convnext\.)?encoder\.stages\.(\d+)\.layers\.", r"stages.\1.blocks."),
    (r"(?:convnext\.)?encoder\.stages\.(\d+)\.downsampling_layer\.", r"stages.\1.downsample."),
    (r"\.layer_scale_parameter$", ".gamma"),
    (r"\.dwconv\.", ".conv_dw."),
    (r"(blocks\.\d+)\.layernorm\.", r"\1.norm."),
    (r"\.pwconv(1|2)\.", r".mlp.fc\1."),
    (r"(^|\.)(?:convnext\.)?layernorm\.", r"\1head.norm."),
    (r"(^|\.)classifier\.", r"\1head.fc."),
)
# A name that only the library's own files have, and what they are read by.
_HABITS: tuple[tuple[str, _Rules], ...] = (
    ("denselayer1.norm.1.weight", _DENSENET),
    ("encoder_layer_0.mlp.linear_1.weight", _OLD_VIT),
    ("embedder.embedder.convolution.weight", _HF_RESNET),
    ("encoder.layers.0.blocks.0.layernorm_before.weight", _HF_SWIN),
    ("encoder.stages.0.layers.0.dwconv.weight", _HF_CONVNEXT),
    ("embeddings.patch_embeddings.projection.weight", _HF_VIT),
)


# The parts of ConvNeXt, EfficientNet, MobileNet and Swin by torchvision's and timm's names, in the order
# in which those beside each other compute; BatchNorms are counted apart.
_ORDER = {
    word: (1, rank)
    for rank, word in enumerate(
        (
            *("stem", "conv_stem", "patch_embed", "features", "downsample", "bn1"),
            *("stages", "layers", "blocks", "layer_scale", "gamma", "block"),
            *("conv", "conv_exp", "conv_pw", "conv_dw", "se", "conv_pwl", "conv_head"),
            *("bn2", "bn3", "norm1", "attn", "norm2"),
            *("relative_position_bias_table", "qkv", "proj", "norm", "reduction", "mlp"),
            *("conv_reduce", "conv_expand", "fc1", "fc2", "fc", "head", "classifier"),
            *("weight", "bias", "running_mean", "running_var"),
        )
    )
}
# What only EfficientNetV2 has, by timm's name.
_TIMM_FUSED = "blocks.0.0.conv.weight"
# What Swin computes from its sizes.
_COMPUTED = ("relative_position_index", "attn_mask")


def named_alike(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by the names that a network of torchvision or timm gives them.

    ResNets, ViTs, ConvNeXts and Swins of Hugging Face, and these, the EfficientNets and the MobileNets
    of torchvision and timm, are the same networks under other names. Prefixes stay, and so do names of
    which nothing is known.

    Args:
        own: the network's own tensors.
        tensors: those of a file.
    """
    found = dict(tensors)
    for mark, rules in _HABITS:
        if any(name.endswith(mark) for name in found):
            found = _renamed(found, rules)
    if any(name.endswith(".attn.q.weight") for name in found):
        found = _joined(found)
    for theirs, ours, rules in (
        ("encoder_layer_0.ln_1.weight", "blocks.0.norm1.weight", _TORCHVISION_VIT),
        ("blocks.0.attn.qkv.weight", "encoder.layers.encoder_layer_0.ln_1.weight", _TIMM_VIT),
    ):
        if ours in own and any(name.endswith(theirs) for name in found):
            return _renamed(found, rules)
    return _in_order(own, found)


def another_network(tensors: Mapping[str, Tensor]) -> str:
    """Say why weights fit no network of torchvision or timm although these have one of the same name.

    Returns:
        The reason and the remedy, or nothing where none is known.
    """
    for mark, kind in (
        ("encoder.blocks.0.depthwise_conv.depthwise_conv.weight", "EfficientNet"),
        ("conv_stem.first_conv.convolution.weight", "MobileNetV2"),
    ):
        if any(name.endswith(mark) for name in tensors):
            return (
                f"they are of Hugging Face's {kind}, another network than torchvision's, since it pads "
                "as TensorFlow does: --model FOLDER, that save_pretrained wrote, or --model hf/NAME"
            )
    if any(name.endswith(_TIMM_FUSED) for name in tensors):
        return (
            "they are of timm's EfficientNetV2, another network than torchvision's, since its "
            "BatchNorms have another epsilon, and its tf_ variants another padding: --model timm/NAME"
        )
    return ""


def _in_order(own: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name tensors after those at the same place in the network, where all shapes agree.

    The libraries cut these networks into stages and blocks in ways of their own, but their layers
    follow each other alike. The last layer may have another number of classes, or be missing.
    """
    ours = _sequence(own)
    # The two libraries' EfficientNetV2 have as much in common, but their logits are far apart.
    if ours is None or any(name.endswith(_TIMM_FUSED) for name in (*own, *tensors)):
        return tensors
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        words = name.split(".")
        start = next((i for i, word in enumerate(words) if word in _ORDER), 0)
        prefix = "".join(f"{word}." for word in words[:start])
        groups.setdefault(prefix, {})[name.removeprefix(prefix)] = tensor
    found = dict(tensors)
    for prefix, group in groups.items():
        theirs = _sequence(group)
        if theirs is None or len(ours) - len(theirs) not in (0, 2):
            continue
        body = len(ours) - 2
        if any(
            _shape(own[o]) != _shape(group[t]) for o, t in zip(ours[:body], theirs, strict=False)
        ):
            continue
        for name in group:
            del found[prefix + name]
        for o, t in zip(ours, theirs, strict=False):
            same = own[o].numel() == group[t].numel()
            found[prefix + o] = group[t].reshape(own[o].shape) if same else group[t]
        found |= {prefix + name: own[name] for name in own if name.endswith(_COMPUTED)}
    return found


def _sequence(tensors: Mapping[str, Tensor]) -> list[str] | None:
    """Return the names of a network's tensors in the order of its layers, BatchNorms first.

    Returns:
        None where a part is not known.
    """
    names = [name for name in tensors if not name.endswith((*_COMPUTED, "num_batches_tracked"))]
    norms = {name.removesuffix("running_mean") for name in names if name.endswith(".running_mean")}
    late = any(re.match(r"layers\.0\.downsample\.", name) for name in names)

    def place(name: str) -> tuple[bool, list[tuple[int, int]]]:
        # timm's blocks without an expansion project with what expands in the others.
        alike = re.sub(r"^(blocks\.0\.\d+\.conv_pw)\.", r"\1l.", name)
        # Swin's authors and Hugging Face end a stage with what timm begins the next with.
        if late:
            alike = re.sub(
                r"^layers\.(\d+)(?=\.downsample)", lambda n: f"layers.{int(n[1]) + 1}", alike
            )
        words = [(0, int(word)) if word.isdecimal() else _ORDER[word] for word in alike.split(".")]
        return name[: name.rfind(".") + 1] not in norms, words

    try:
        return sorted(names, key=place)
    except KeyError:
        return None


def _shape(tensor: Tensor) -> list[int]:
    """Return a shape without what makes a layer a 1 × 1 convolution."""
    return [side for side in tensor.shape if side != 1]


def _renamed(tensors: Mapping[str, Tensor], rules: _Rules) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, written in rules:
            name = re.sub(pattern, written, name)
        renamed[re.sub(r"<(\d+)>", lambda found: str(int(found[1]) + 1), name)] = tensor
    return renamed


def _joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join queries, keys and values, which timm and torchvision keep in one."""
    joined = {}
    for name, tensor in tensors.items():
        head, _, kind = name.rpartition(".")
        if not head.endswith((".attn.q", ".attn.k", ".attn.v")):
            joined[name] = tensor
        elif head.endswith("q"):
            parts = [tensors.get(f"{head[:-1]}{part}.{kind}") for part in "qkv"]
            same = [part for part in parts if part is not None and part.shape == tensor.shape]
            if len(same) == 3:
                joined[f"{head}kv.{kind}"] = torch.cat(same)
    return joined
