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
_CLD_CIFAR = {
    "method": "cld",
    "network": "cifar-resnet18",
    "image_size": 32,
    "temperature": 0.07,
    "momentum": 0.9,
    "keep": 0.999,
    "group_temperature": 0.2,
    "smallest": 0.2,
    "colors": 0.8,
    "gray": 0.2,
}
_USLT_CIFAR = {
    "network": "trained",
    "heads": "linear",
    "count": 3,
    "steps": 9_600,
    "batch": 1_024,
    "lr": 1e-4,
    "weight_decay": 1e-4,
    "threshold": 0.95,
    "local_weight": 5.0,
    "adjustment": 5.0,
    "temperature": 0.25,
    "reweight": "count",
    "neighbors": 20,
    "strong": "randaugment",
    "pick": "confidence",
}
_USLT_IMAGENET = {
    "network": "frozen",
    "heads": "cosine",
    "count": 3,
    "scale": 40.0,
    "batch": 2_048,
    "lr": 1e-4,
    "weight_decay": 1e-4,
    "threshold": 0.0,
    "local_weight": 0.5,
    "adjustment": 2.5,
    "temperature": 0.5,
    "mean_of_all": True,
    "neighbors": 20,
    "strong": "moco",
    "pick": "density",
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
    # SimCLR as SCAN trains it (wvangansbeke/Unsupervised-Classification,
    # configs/pretext/simclr_cifar10.yml), whose checkpoints USL-T begins from: 500 epochs of 97 steps.
    "simclr-cifar10": {
        "pretrain": {
            "method": "simclr",
            "network": "cifar-resnet18",
            "image_size": 32,
            "steps": 48_500,
            "batch": 512,
            "temperature": 0.1,
            "lr": 0.4,
            "warmup": 0,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "smallest": 0.2,
            "colors": 0.8,
            "gray": 0.2,
            "blur": 0.0,
        }
    },
    # MoCo v2 (facebookresearch/moco, its README): 200 epochs of 5,004 steps.
    "moco-v2-imagenet": {
        "pretrain": {
            "method": "moco",
            "network": "resnet50",
            "image_size": 224,
            "steps": 1_000_800,
            "batch": 256,
            "temperature": 0.2,
            "lr": 0.03,
            "warmup": 0,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "keep": 0.999,
            "queue": 65_536,
            "smallest": 0.2,
            "colors": 0.8,
            "gray": 0.2,
            "blur": 0.5,
        }
    },
    # CLD (frank-xwang/CLD-UnsupervisedLearning, scripts/cifar/train_cifar10_moco_cld.sh): 200 epochs of 195
    # steps, warmed up for 5. Its random erasing is left out.
    "cld-cifar10": {
        "pretrain": {
            **_CLD_CIFAR,
            "steps": 39_000,
            "batch": 256,
            "lr": 0.06,
            "warmup": 975,
            "weight_decay": 8e-4,
            "queue": 12_288,
            "groups": 200,
            "group_weight": 0.8,
            "blur": 0.5,
        }
    },
    # The same of CIFAR-100 (train_cifar100_moco_cld.sh): 200 epochs of 390 steps. Colors are changed less.
    "cld-cifar100": {
        "pretrain": {
            **_CLD_CIFAR,
            "steps": 78_000,
            "batch": 128,
            "lr": 0.03,
            "warmup": 1_950,
            "weight_decay": 7e-4,
            "queue": 4_096,
            "groups": 100,
            "group_weight": 0.25,
            "blur": 0.0,
        }
    },
    # USL-T on CIFAR-10 (usl-t_pretraining/usl-t-cifar-pretrain.py): 200 epochs of 48 steps from SimCLR's
    # weights, given with --checkpoint; budget 40. Strong views have two operations, not four.
    "usl-t-cifar10": {
        "embed": {"encoder": "simclr"},
        "density": {"k": 20},
        "selection": {"method": "usl-t"},
        "usl_t": _USLT_CIFAR | {"mean_of_all": False, "confidence_of_all": True},
    },
    # The same of CIFAR-100; budget 400.
    "usl-t-cifar100": {
        "embed": {"encoder": "simclr"},
        "density": {"k": 20},
        "selection": {"method": "usl-t"},
        "usl_t": _USLT_CIFAR | {"mean_of_all": True, "confidence_of_all": False},
    },
    # USL-T on ImageNet-100 (usl-t-imagenet-pretrain.py): 100 epochs of 61 steps on MoCo v2's features, its
    # head's; budget 400. The published label propagation is left to train.propagate = 20.
    "usl-t-imagenet100": {
        "embed": {"encoder": "moco-v2-head"},
        "density": {"k": 20},
        "selection": {"method": "usl-t"},
        "usl_t": _USLT_IMAGENET
        | {
            "steps": 6_100,
            "reweight": "renorm",
            "repair_after": 124,
            "repair_below": 50,
            "repair_above": 500,
        },
    },
    # USL-T on ImageNet: 10 epochs of 625 steps, 3,000 clusters of which the largest are taken; budget 2,911.
    "usl-t-imagenet": {
        "embed": {"encoder": "moco-v2-head"},
        "density": {"k": 20},
        "selection": {"method": "usl-t"},
        "usl_t": _USLT_IMAGENET
        | {
            "clusters": 3_000,
            "steps": 6_250,
            "reweight": "none",
            "repair_after": 1_250,
            "repair_below": 100,
            "repair_above": 1_000,
        },
    },
}
