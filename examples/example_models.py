"""Small classifiers of the digits with committed weights, to try the commands on.

    certify attack examples.example_models:capped --checkpoint examples/models/capped.safetensors \
        --dataset digits --eps 0.1,0.3 --audit

python examples/example_models.py train     trains them all again, to the same weights on the same machine
python examples/example_models.py           prints their accuracies
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from speccert.experiments import load_dataset
from speccert.experiments.checkpoints import load_checkpoint, save_checkpoint
from speccert.models import build_model, constrain

FOLDER = Path(__file__).parent / "models"
WIDTH, DEPTH = 64, 2
EPOCHS = 20


def plain(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A dense ReLU net, trained on the cross-entropy."""
    return build_model("mlp", input_shape, num_classes, width=WIDTH, depth=DEPTH, activation="relu")


def robust(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The same net, trained on the points that PGD finds within l2 eps 0.5."""
    return plain(input_shape, num_classes)


def capped(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A dense MaxMin net whose layers are capped at spectral norm 1."""
    body = build_model("mlp", input_shape, num_classes, width=WIDTH, depth=DEPTH, activation="maxmin")
    return constrain(body, 1.0, "cap", input_shape=input_shape)


def orthogonal(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A dense MaxMin net of orthogonal layers."""
    body = build_model("mlp", input_shape, num_classes, width=WIDTH, depth=DEPTH, activation="maxmin")
    return constrain(body, 1.0, "orthogonal", input_shape=input_shape)


class Rounded(nn.Module):
    """Rounds pixels to multiples of 1/8; in training the gradient passes as if it did not."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the rounded pixels."""
        rounded = torch.round(8 * x) / 8
        return x + (rounded - x).detach() if self.training else rounded


def quantised(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A masked one: the plain net behind `Rounded`, whose gradient is 0, so that gradient attacks see nothing."""
    return nn.Sequential(Rounded(), plain(input_shape, num_classes))


MODELS: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    builder.__name__: builder for builder in (plain, robust, capped, orthogonal, quantised)
}
TEMPERATURE = {"capped": 0.05, "orthogonal": 0.05}  # logits of 1-Lipschitz nets are small


def load(name: str) -> nn.Module:
    """The model of that name with its committed weights, in eval mode."""
    model = MODELS[name]((1, 8, 8), 10)
    load_checkpoint(model, FOLDER / f"{name}.safetensors")
    return model.eval()


def ascended(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, steps: int = 5) -> Tensor:
    """The last point of projected gradient ascent in l2, written out so that the weights do not hang on the attacks."""
    z = x.clone()
    for _ in range(steps):
        z.requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(z), y), z)
        delta = (z.detach() - x + eps / 2 * nn.functional.normalize(gradient.flatten(1)).view_as(x)).flatten(1)
        z = (x + (delta * (eps / delta.norm(dim=1, keepdim=True)).clamp_max(1.0)).view_as(x)).clamp(0.0, 1.0)
    return z


def train(name: str) -> nn.Module:
    """Train it in a few seconds on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = load_dataset("digits")
    model = MODELS[name](data.input_shape, data.num_classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(data.train)).split(64):
            x, y = data.train.x[rows], data.train.y[rows]
            if name == "robust":
                x = ascended(model, x, y, eps=0.5)
            loss = nn.functional.cross_entropy(model(x) / TEMPERATURE.get(name, 1.0), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def main() -> None:
    """Train and save the models, or print what they reach on the test part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=["train"], help="train all models again and save their weights")
    task = parser.parse_args().task
    test = load_dataset("digits").test
    for name in MODELS:
        if task == "train":
            save_checkpoint(FOLDER / f"{name}.safetensors", train(name).state_dict())
        correct = load(name)(test.x).argmax(1) == test.y
        print(f"{name}: clean accuracy {100 * float(correct.double().mean()):.1f} %")


if __name__ == "__main__":
    main()
