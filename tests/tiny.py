"""Settings of a cell on digits that trains and is attacked in about a second."""

TINY = {
    "width": 16,
    "epochs": 2,
    "train_samples": 300,
    "test_samples": 60,
    "attack_samples": 20,
    "attacks": ["fgsm", "ddn"],
    "loss": "cross-entropy",
}
