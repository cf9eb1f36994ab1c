"""Names of a network's tensors in other libraries, written as torchvision or timm writes them."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_Rules = tuple[tuple[str, str], ...]

# DenseNet's published weights are older than the ban on dots in the names of parts.
_DENSENET: _Rules = ((r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2"),)
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
# A name that only the library's own files have, and what they are read by.
_HABITS: tuple[tuple[str, _Rules], ...] = (
    ("denselayer1.norm.1.weight", _DENSENET),
    ("embedder.embedder.convolution.weight", _HF_RESNET),
    ("embeddings.patch_embeddings.projection.weight", _HF_VIT),
)


def named_alike(own: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by the names that a network of torchvision or timm gives them.

    ResNets and ViTs of Hugging Face, and the ViTs of torchvision and timm, are the same networks under
    other names. Prefixes stay, and so do names of which nothing is known.

    Args:
        own: the names of the network's own tensors.
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
    return found


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
