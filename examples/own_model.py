"""Bound, certify and attack a model of one's own, in plain torch code.

python examples/own_model.py
"""

import torch
from torch import nn

from speccert.attacks import attack
from speccert.certify import certified_accuracy, certified_radii, lipschitz
from speccert.experiments import load_dataset
from speccert.models import Normalize, constrain


def build(input_shape: tuple[int, ...] = (1, 8, 8), num_classes: int = 10) -> nn.Module:
    """A small conv net whose layers are held to spectral norm 1.2."""
    model = nn.Sequential(
        Normalize(0.3, 0.5),
        nn.Conv2d(input_shape[0], 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(num_classes),
    )
    model(torch.zeros(1, *input_shape))
    return constrain(model, threshold=1.2, input_shape=input_shape)


def main() -> None:
    """Train for a few seconds, then print the bracket of the Lipschitz constant and the two accuracies."""
    torch.manual_seed(0)
    data = load_dataset("digits")
    model = build(data.input_shape, data.num_classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(20):
        for chosen in torch.randperm(len(data.train)).split(64):
            loss = nn.functional.cross_entropy(10 * model(data.train.x[chosen]), data.train.y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()

    x, y = data.test.x, data.test.y
    bound = lipschitz(model, data.input_shape, points=x)
    print(f"Lipschitz constant between {bound.lower:.3f} and {bound.upper:.3f}")
    for layer in bound.layers:
        print(f"  {layer.name}: norm in [{layer.lower:.6f}, {layer.upper:.6f}] ({layer.method})")

    radii = certified_radii(model, x, y)
    for eps in (0.1, 0.2):
        found = attack(model, x, y, "pgd", norm="l2", eps=eps)
        certified = float(certified_accuracy(radii, eps))
        print(f"eps {eps}: certified accuracy {certified:.3f} <= accuracy under PGD {found.accuracy:.3f}")


if __name__ == "__main__":
    main()
