"""Settings that come together: defaults of data sets and baselines, and presets that have a name."""

import math
from typing import Any

DEFAULT_THRESHOLDS = (0.5, 0.7, 1.0, 1.5, math.inf)  # of a study that gives none
BASELINE_SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "weight-decay": {"weight_decay": 5e-3},
    "gradient-clip": {"gradient_clip": 1.0},
}

# What a data set changes in the defaults of CellConfig, for every key that the user leaves unset.
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {},
    "mnist": {
        "loss_eps": 1.58,
        "epochs": 10,
        "batch_size": 256,
        "eps": (0.3, 1.0, 1.58),
        "attack_samples": 1000,
    },
    "fashion-mnist": {
        "loss_eps": 0.5,
        "epochs": 10,
        "batch_size": 256,
        "eps": (0.25, 0.5, 1.0),
        "attack_samples": 1000,
    },
    "cifar10": {
        "model": "liresnet",
        "loss_eps": 72 / 255,
        "epochs": 60,
        "batch_size": 256,
        "augment": "shift-flip",
        "eps": (36 / 255, 72 / 255, 108 / 255),
        "attack_samples": 1000,
    },
}

# Settings under a name, as the tables [preset.NAME] of a file hold them.
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "warmup_epochs": 0,
        "epochs": 1,
        "train_samples": 500,
        "test_samples": 100,
        "validation_fraction": 0.02,
        "attack_samples": 10,
    },
    "mnist-dense": {
        "dataset": "mnist",
        "model": "mlp",
        "width": 256,
        "depth": 5,
        "activation": "maxmin",
        "constraint": "orthogonal-projected",
        "threshold": 1.0,
        "loss": "offset-ce",
        "loss_eps": 1.9,
        "temperature": 0.21,
        "optimizer": "sgd",
        "lr": 0.25,
        "gradient_clip": 1.0,
        "schedule": "linear",
        "warmup_epochs": 6,
        "epochs": 60,
        "batch_size": 256,
        "validation_fraction": 0.02,
        "eps": [0.3, 1.0, 1.58],
        "attacks": ["fgsm", "pgd", "ddn"],
        "attack_samples": 1000,
    },
    "cifar10-liresnet": {
        "dataset": "cifar10",
        "model": "liresnet",
        "width": 128,
        "depth": 8,
        "constraint": "cap",
        "threshold": 1.0,
        "loss": "emma",
        "loss_eps": "72/255",
        "temperature": 0.25,
        "optimizer": "adamw",
        "lr": 1e-3,
        "schedule": "cosine",
        "warmup_epochs": 5,
        "epochs": 200,
        "batch_size": 256,
        "augment": "shift-flip",
        "eps": ["36/255", "72/255", "108/255"],
        "attacks": ["pgd", "autoattack", "ddn"],
        "attack_samples": 1000,
    },
}
