"""Presets: the constants of published runs, each with its source."""

from __future__ import annotations

from typing import Any

# The published code has no floor; this one only keeps infinities away.
_PUBLISHED_FLOOR = 1e-12
_CIFAR = {
    # The published features are those of a CLD ResNet-18 at 32 pixels, given here with --embeddings; this is
    # the nearest network of torchvision.
    "embed": {"encoder": "resnet18"},
    # selective_labeling/usl-cifar.py: 0.8 % of 50,000 images, themselves included.
    "density": {"k": 400, "floor": _PUBLISHED_FLOOR},
    # 200 iterations without a test of convergence; labels lag one update.
    "cluster": {"iterations": 200, "tolerance": 0.0, "final_assignment": False},
}
_IMAGENET = {
    "embed": {"encoder": "resnet50"},
    # selective_labeling/usl-imagenet.py
    "density": {"k": 20, "floor": _PUBLISHED_FLOOR},
    "cluster": {"iterations": 100, "tolerance": 0.0, "final_assignment": False},
}
_FIXMATCH_CIFAR = {
    "network": "wrn-28-2",
    "image_size": 32,
    "steps": 2**20,
    "batch": 64,
    "unlabeled_ratio": 7,
    "unlabeled_weight": 1.0,
    "threshold": 0.95,
    "teacher": "network",
    "average": 0.999,
    "average_statistics": False,
    "lr": 0.03,
    "warmup": 0,
    "schedule": "cosine",
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "cutout": 0.5,
    "evaluate_every": 1_024,
    "checkpoint_every": 1_024,
}
# Constants of the published code (TonyLianLong/UnsupervisedSelectiveLabeling, ceaab3c), by its configuration.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # configs/cifar10_usl.yaml: budget 40, seeds 1 to 5.
    "usl-cifar10": {
        **_CIFAR,
        "selection": {
            "rounds": 10,
            "weight": 0.5,
            "momentum": 0.9,
            "alpha": 0.5,
            "horizon_sq_dist": 4.0,
            "horizon_picks": 0,
            "exclude_own_cluster": True,
            "scale": "none",
        },
    },
    # configs/cifar100_usl.yaml: budget 400, seeds 1 to 5.
    "usl-cifar100": {
        **_CIFAR,
        "selection": {
            "rounds": 10,
            "weight": 1.0,
            "momentum": 0.9,
            "alpha": 1.0,
            "horizon_sq_dist": 1.0,
            "horizon_picks": 0,
            "exclude_own_cluster": True,
            "scale": "none",
        },
    },
    # configs/imagenet_usl_moco_0.2.yaml: budget 2,911, seed 0; alpha is the code's default. Only a pick at
    # distance exactly 0 is left out, so a pick repels the rest of its own cluster.
    "usl-imagenet-moco": {
        **_IMAGENET,
        "selection": {
            "rounds": 2,
            "weight": 1.5,
            "momentum": 0.0,
            "alpha": 0.5,
            "horizon_sq_dist": 0.0,
            "horizon_picks": 128,
            "exclude_own_cluster": False,
            "scale": "none",
        },
    },
    # configs/imagenet_usl_clip_0.2.yaml: budget 2,911, seed 0. CLIP's image tower is not in torchvision.
    "usl-imagenet-clip": {
        **_IMAGENET,
        "embed": {"encoder": "vit_b_16"},
        "selection": {
            "rounds": 2,
            "weight": 0.05,
            "momentum": 0.0,
            "alpha": 1.0,
            "horizon_sq_dist": 0.0,
            "horizon_picks": 32,
            "exclude_own_cluster": True,
            "scale": "none",
        },
    },
    # FixMatch as USL's authors ran it on CIFAR-10 (semisup-fixmatch-cifar/train.py, a fork of
    # kekmodel/FixMatch-pytorch): 2^20 steps of 64 + 448 images, statistics of the average copied.
    "fixmatch-cifar10": {"train": _FIXMATCH_CIFAR},
    # The same with a wider network and, as its README says, twice the weight decay.
    "fixmatch-cifar100": {"train": {**_FIXMATCH_CIFAR, "network": "wrn-28-8", "weight_decay": 1e-3}},
    # FixMatch with EMAN (main_fixmatch.py of EMAN, its example command): 100 epochs of 1,281,167 images in
    # steps of 64 + 320, drops at 60 and 80, warmed up for 5; give MoCo-EMAN's weights with train.checkpoint.
    # Views are cut as here, not from boxes of random size, and Cutout is left out.
    "fixmatch-imagenet-eman": {
        "train": {
            "network": "resnet50",
            "image_size": 224,
            "steps": 400_400,
            "batch": 64,
            "unlabeled_ratio": 5,
            "unlabeled_weight": 10.0,
            "threshold": 0.7,
            "teacher": "average",
            "average": 0.999,
            "average_statistics": True,
            "lr": 0.03,
            "warmup": 20_020,
            "schedule": "steps",
            "weight_decay": 1e-4,
            "cutout": 0.0,
            "evaluate_every": 4_004,
            "checkpoint_every": 1_001,
        }
    },
}
