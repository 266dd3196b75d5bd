"""Networks of other libraries as their users build them, with random weights, at small sizes.

Every entry is a function without arguments that returns the network and a tuple of its arguments. A library is only
imported when one of its networks is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, tuple[Any, ...]]

_YOLO = {
    "yolov5n": "DetectionModel",
    "yolov8n": "DetectionModel",
    "yolov8n-seg": "SegmentationModel",
    "yolov8n-pose": "PoseModel",
    "yolov9t": "DetectionModel",
    "yolov10n": "DetectionModel",
    "yolo11n": "DetectionModel",
    "yolo11n-obb": "OBBModel",
    "yolo12n": "DetectionModel",
}
_SMP = "Unet UnetPlusPlus FPN PSPNet DeepLabV3 DeepLabV3Plus Linknet MAnet PAN UPerNet Segformer".split()
_DETECTORS = (
    "fasterrcnn_mobilenet_v3_large_320_fpn ssdlite320_mobilenet_v3_large retinanet_resnet50_fpn fcos_resnet50_fpn "
    "keypointrcnn_resnet50_fpn"
).split()
_SEGMENTATION = "deeplabv3_mobilenet_v3_large fcn_resnet50 lraspp_mobilenet_v3_large".split()
_VIDEO = "r3d_18 mc3_18 r2plus1d_18 s3d mvit_v1_b".split()
_PYTORCHCV = (
    "seresnet18 preresnet18 shufflenet_g3_wd4 menet108_8x1_g3 igcv3_w1 dla34 vovnet27s hrnet_w18_small_v1 peleenet "
    "diracnet18v2 lwopenpose2d_mobilenet_cmupan_coco fastscnn_cityscapes"
).split()
_IN_3D = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3}
_MONAI: dict[str, dict[str, Any]] = {
    "UNet": {**_IN_3D, "channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 1},
    "BasicUNet": {**_IN_3D, "features": (8, 8, 16, 32, 32, 8)},
    "AttentionUnet": {**_IN_3D, "channels": (8, 16, 32), "strides": (2, 2)},
    "SegResNet": {"spatial_dims": 3, "in_channels": 1, "out_channels": 3, "init_filters": 8},
    "VNet": {"spatial_dims": 3, "in_channels": 1, "out_channels": 3},
    "DynUNet": {**_IN_3D, "kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]},
    "UNETR": {
        "in_channels": 1,
        "out_channels": 3,
        "img_size": 32,
        "hidden_size": 96,
        "mlp_dim": 128,
        "num_heads": 4,
    },
    "SwinUNETR": {"in_channels": 1, "out_channels": 3, "feature_size": 12},
    "AutoencoderKL": {
        **_IN_3D,
        "out_channels": 1,
        "channels": (8, 8, 16),
        "attention_levels": (False, False, True),
        "latent_channels": 3,
        "norm_num_groups": 4,
        "num_res_blocks": 1,
    },
}
_SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}

_SWIN = {"image_size": 64, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
_STAGES = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}
_HUGGING_FACE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTConfig", "ViTForImageClassification", {**_SMALL, "image_size": 64}),
    "dinov2": (
        "Dinov2Config",
        "Dinov2ForImageClassification",
        {**_SMALL, "image_size": 64, "patch_size": 16},
    ),
    "beit": ("BeitConfig", "BeitForImageClassification", {**_SMALL, "image_size": 64}),
    "yolos": (
        "YolosConfig",
        "YolosForObjectDetection",
        {**_SMALL, "image_size": [64, 64], "num_detection_tokens": 8},
    ),
    "swin": ("SwinConfig", "SwinForImageClassification", _SWIN),
    "segformer": ("SegformerConfig", "SegformerForSemanticSegmentation", {}),
    "convnextv2": ("ConvNextV2Config", "ConvNextV2ForImageClassification", _STAGES),
    "resnet": ("ResNetConfig", "ResNetForImageClassification", {**_STAGES, "embedding_size": 16}),
    "mobilevit": ("MobileViTConfig", "MobileViTForImageClassification", {"image_size": 64}),
    "poolformer": ("PoolFormerConfig", "PoolFormerForImageClassification", {"depths": [1, 1, 1, 1]}),
    "clip-vision": ("CLIPVisionConfig", "CLIPVisionModelWithProjection", {**_SMALL, "image_size": 64}),
    "siglip-vision": ("SiglipVisionConfig", "SiglipVisionModel", {**_SMALL, "image_size": 64}),
    "videomae": (
        "VideoMAEConfig",
        "VideoMAEForVideoClassification",
        {**_SMALL, "image_size": 32, "num_frames": 4},
    ),
}


def _yolo(name: str) -> Built:
    from ultralytics.nn import tasks

    return getattr(tasks, _YOLO[name])(f"{name}.yaml", verbose=False), (torch.randn(2, 3, 96, 96),)


def _smp(name: str) -> Built:
    import segmentation_models_pytorch as smp

    side = 128 if name == "PAN" else 64  # PAN pools three more times
    return getattr(smp, name)("resnet18", encoder_weights=None, classes=5), (torch.randn(2, 3, side, side),)


def _detector(name: str) -> Built:
    from torchvision.models import detection

    # By default the larger ones scale every image up to 800 pixels, which only benchmarks convolutions.
    size = {"min_size": 128, "max_size": 160} if "resnet50" in name else {}
    model = getattr(detection, name)(weights=None, weights_backbone=None, **size)
    return model, ([torch.rand(3, 128, 160), torch.rand(3, 128, 160)],)


def _segmentation(name: str) -> Built:
    from torchvision.models import segmentation

    model = getattr(segmentation, name)(weights=None, weights_backbone=None)
    return model, (torch.randn(2, 3, 64, 64),)


def _video(name: str) -> Built:
    from torchvision.models import video

    side = 224 if name in ("mvit_v1_b", "s3d") else 64  # fixed positions, and a pool of 7×7
    return getattr(video, name)(weights=None), (torch.randn(1, 3, 16, side, side),)


def _raft() -> Built:
    from torchvision.models.optical_flow import raft_small

    return raft_small(weights=None), (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))


def _hugging_face(name: str) -> Built:
    import transformers

    config, model, options = _HUGGING_FACE[name]
    side = 32 if name == "videomae" else 64
    images = torch.randn(2, 4, 3, side, side) if name == "videomae" else torch.randn(2, 3, side, side)
    return getattr(transformers, model)(getattr(transformers, config)(**options)), (images,)


def _monai(name: str) -> Built:
    from monai.networks import nets

    # It halves the length five times, and its norms need two positions.
    length = 64 if name == "SwinUNETR" else 32
    return getattr(nets, name)(**_MONAI[name]), (torch.randn(1, 1, length, 32, 32),)


def _pytorchcv(name: str) -> Built:
    from pytorchcv.model_provider import get_model

    model = get_model(name)
    return model, (torch.randn(2, 3, 224, 224),)  # they end with a pool of 7×7


def _entries() -> dict[str, Callable[[], Built]]:
    found: dict[str, Callable[[], Built]] = {"torchvision/raft_small": _raft}
    tables: dict[str, tuple[Any, Callable[[str], Built]]] = {
        "ultralytics": (_YOLO, _yolo),
        "segmentation_models_pytorch": (_SMP, _smp),
        "torchvision": (_DETECTORS, _detector),
        "torchvision ": (_SEGMENTATION, _segmentation),
        "torchvision  ": (_VIDEO, _video),
        "transformers": (_HUGGING_FACE, _hugging_face),
        "monai": (_MONAI, _monai),
        "pytorchcv": (_PYTORCHCV, _pytorchcv),
    }
    for library, (names, build) in tables.items():
        for name in names:
            found[f"{library.strip()}/{name}"] = lambda build=build, name=name: build(name)  # type: ignore[misc]
    return found


#: "library/name" → function that builds the network and its arguments.
FOREIGN = _entries()
