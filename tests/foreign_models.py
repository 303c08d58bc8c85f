"""Small models of transformers and timm that have a BiT inside, in evaluation mode, and images for each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from tests.model_pairs import move_weights, their_model

SMALL_HYBRID: dict[str, Any] = {
    "layer_type": "bottleneck",
    "global_padding": "same",
    "embedding_dynamic_padding": True,
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 64, 128],
    "depths": [1, 2, 1],
    "num_groups": 4,
    "out_features": ["stage1", "stage2", "stage3"],
}


def dpt_hybrid() -> nn.Module:
    config = transformers.DPTConfig(
        is_hybrid=True,
        backbone_config=transformers.BitConfig(**SMALL_HYBRID),
        backbone_featmap_shape=[1, 64, 4, 4],
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=64,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 32, 32, 32],
        fusion_hidden_size=24,
        neck_ignore_stages=[0, 1],
        readout_type="project",
    )
    return transformers.DPTForDepthEstimation(config)


def upernet() -> nn.Module:
    backbone = transformers.BitConfig(
        embedding_size=8,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 2, 1, 1],
        num_groups=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone,
        hidden_size=16,
        pool_scales=[1, 2],
        auxiliary_channels=8,
        auxiliary_in_channels=48,
        num_labels=5,
    )
    return transformers.UperNetForSemanticSegmentation(config)


def timm_resnet(*, hybrid: bool = False, **settings: Any) -> nn.Module:
    """A ResNetV2 as timm builds it for ``resnetv2_*_bit``, or for hybrid ViTs, but small."""
    from timm.layers import GroupNormAct, StdConv2d, StdConv2dSame
    from timm.models.resnetv2 import ResNetV2

    kind: dict[str, Any] = {"stem_type": "fixed", "conv_layer": partial(StdConv2d, eps=1e-8)}
    if hybrid:
        kind = {
            "preact": False,
            "stem_type": "same",
            "conv_layer": partial(StdConv2dSame, eps=1e-8),
        }
    sizes: dict[str, Any] = {
        "layers": (1, 2, 1, 1),
        "channels": (16, 32, 48, 64),
        "stem_chs": 8,
        "num_classes": 5,
        "norm_layer": partial(GroupNormAct, num_groups=4),
    }
    return ResNetV2(**{**kind, **sizes, **settings})


class TimmHybrid(nn.Module):
    """A ViT on a small ResNet, as ``vit_*_r*`` is built."""

    def __init__(self) -> None:
        super().__init__()
        from timm.layers import HybridEmbed
        from timm.models.vision_transformer import VisionTransformer

        sizes = {"layers": (1, 2, 1), "channels": (16, 32, 48)}
        backbone = timm_resnet(hybrid=True, num_classes=0, global_pool="", **sizes)
        self.vit = VisionTransformer(
            img_size=64,
            patch_size=1,
            embed_dim=32,
            depth=2,
            num_heads=2,
            num_classes=5,
            embed_layer=partial(HybridEmbed, backbone=backbone),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(x)


def timm_features() -> nn.Module:
    """The feature maps of all stages, each module called by timm's own list of them."""
    from timm.models._features import FeatureListNet

    return FeatureListNet(timm_resnet(), out_indices=(0, 1, 2, 3, 4), flatten_sequential=True)


class Foreign(NamedTuple):
    """How to build a model, and what images it takes."""

    build: Callable[[], nn.Module]
    size: tuple[int, int] = (64, 50)

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        model = self.build().eval()
        move_weights(model)
        return model.to(dtype)

    def images(self, dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
        return torch.randn(batch, 3, *self.size).to(dtype)


TRANSFORMERS: dict[str, Foreign] = {
    "BitModel": Foreign(partial(their_model, "BitModel")),
    "BitModel bottleneck": Foreign(partial(their_model, "BitModel", layer_type="bottleneck")),
    "BitForImageClassification": Foreign(partial(their_model, "BitForImageClassification")),
    "same padding": Foreign(
        partial(their_model, "BitModel", global_padding="same", embedding_dynamic_padding=True)
    ),
    "valid padding": Foreign(
        partial(their_model, "BitModel", global_padding="valid", depths=[1], hidden_sizes=[16]),
        (16, 16),
    ),
    "gelu": Foreign(partial(their_model, "BitModel", hidden_act="gelu")),
    "output stride 8": Foreign(
        partial(their_model, "BitBackbone", output_stride=8, depths=[1, 1, 2, 2])
    ),
    "BitBackbone": Foreign(
        partial(their_model, "BitBackbone", out_features=["stem", "stage2", "stage4"])
    ),
    "DPT-hybrid": Foreign(dpt_hybrid, (64, 64)),
    "UperNet": Foreign(upernet, (64, 64)),
}

TIMM: dict[str, Foreign] = {
    "ResNetV2": Foreign(timm_resnet),
    "ResNetV2 of a hybrid": Foreign(partial(timm_resnet, hybrid=True)),
    "ResNetV2 with drop path": Foreign(partial(timm_resnet, drop_path_rate=0.2)),
    "hybrid ViT": Foreign(TimmHybrid, (64, 64)),
    "features only": Foreign(timm_features),
}

ALL = {**TRANSFORMERS, **TIMM}
