import copy
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from speccert.certify.digests import input_digests, model_digest
from speccert.certify.graph import trace
from speccert.certify.rules import leaf_types
from speccert.experiments.checkpoints import load_checkpoint, save_checkpoint
from speccert.models import build_model, constrain

SHAPE = (3, 8, 8)
SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_digests import digest, network
print(digest(network()))
"""


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.norm, self.act = nn.BatchNorm2d(3), nn.LeakyReLU(0.1)
        self.last = nn.Linear(192, 4)

    def forward(self, x):
        y = self.act(self.norm(self.first(x)))
        return self.last((x + 0.5 * self.second(y)).flatten(1))


def network():
    torch.manual_seed(0)
    return Residual().eval()


def digest(model, shape=SHAPE):
    return model_digest(trace(model, shape, leaf_types()))


def changed(change):
    model = network()
    change(model)
    return model


def last_bit(model):
    bits = model.second.weight.data.view(torch.int32)
    bits[0, 0, 0, 0] ^= 1


def swap(model):
    model.first, model.second = model.second, model.first


def order(model):
    model.norm, model.act = model.act, model.norm


def replaced(name, value):
    return lambda model: setattr(model, name, value)


CHANGES = {
    "the last bit of a weight": last_bit,
    "a layer swap": swap,
    "other operations in the same places": order,
    "a padding mode": lambda model: setattr(model.first, "padding_mode", "circular"),
    "a negative slope": replaced("act", nn.LeakyReLU(0.2)),
    "a negative slope in its last bit": replaced("act", nn.LeakyReLU(0.10000000000000002)),
    "an activation": replaced("act", nn.ReLU()),
    "an eps": lambda model: setattr(model.norm, "eps", 1e-3),
    "a running mean": lambda model: model.norm.running_mean.add_(1e-3),
    "the sign of a zero": lambda model: model.norm.running_mean.neg_(),
    "the type": lambda model: model.double(),
    "a buffer more": lambda model: model.register_buffer("more", torch.zeros(1)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_change_shows(change):
    assert digest(changed(change)) != digest(network())


def test_a_stride_shows():
    def net(stride):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3, stride=stride, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()

    assert digest(net(1)) != digest(net(2))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x * 2, lambda x: x * 2.0),
        (lambda x: x * 0.1, lambda x: x * 0.10000000000000002),
        (lambda x: x + x, lambda x: x - x),
        (lambda x: torch.relu(x), lambda x: torch.tanh(x)),
        (lambda x: x.flatten(1), lambda x: x.flatten(2)),
        (lambda x: (x * 2) - x, lambda x: x - (x * 2)),
        (lambda x: torch.cat((x, 2 * x), 1), lambda x: torch.cat((2 * x, x), 1)),
    ],
)
def test_the_graph_shows(one, other):
    def net(function):
        class Net(nn.Module):
            def forward(self, x):
                return function(x)

        return digest(Net().eval())

    assert net(one) != net(other)


def test_constant_tensors_show_and_tracing_again_changes_nothing():
    class Scaled(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return x * torch.tensor([self.factor]) + torch.zeros(1)

    one, other = Scaled(1.0).eval(), Scaled(2.0).eval()
    assert digest(one) == digest(one) == digest(Scaled(1.0).eval())
    assert digest(one) != digest(other)


def test_attributes_of_a_layer_of_ones_own_show():
    class Own(nn.Module):
        def __init__(self, factor, tensor=0.0):
            super().__init__()
            self._factor, self.tensor = factor, torch.tensor(tensor)

        def forward(self, x):
            return x * self._factor if float(self.tensor) >= 0 else x

    def found(*arguments):
        model = nn.Sequential(Own(*arguments)).eval()
        return model_digest(trace(model, (3,), frozenset([Own])))

    assert found(1.0) == found(1.0)
    assert len({found(1.0), found(2.0), found(1), found(1.0, 0.5)}) == 4


def test_equal_in_another_process():
    tests = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(tests=tests)], capture_output=True, text=True, check=True, env=environment
    )
    assert ended.stdout.strip() == digest(network())


@pytest.mark.parametrize("constraint", ["cap", "orthogonal"])
def test_equal_for_a_reloaded_checkpoint_and_for_weights_made_plain(constraint, tmp_path):
    def built(seed):
        torch.manual_seed(seed)
        model = build_model("convnet-4c3f", (1, 8, 8), 10, width=4)
        return constrain(model, constraint=constraint, threshold=0.5, input_shape=(1, 8, 8)).eval()

    model, other = built(0), built(1)
    save_checkpoint(tmp_path / "weights.safetensors", model.state_dict())
    assert digest(model, (1, 8, 8)) != digest(other, (1, 8, 8))
    load_checkpoint(other, tmp_path / "weights.safetensors")
    found = digest(model, (1, 8, 8))
    assert digest(other, (1, 8, 8)) == found
    for module in list(other.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    assert digest(other, (1, 8, 8)) == found


def test_a_copy_and_gradients_and_mode_change_nothing():
    model = network()
    other = copy.deepcopy(model).requires_grad_(False)
    assert digest(other) == digest(model)
    assert digest(model.train()) == digest(other)
    assert model.training


def test_an_argument_that_no_digest_covers_is_refused():
    graph = trace(nn.Sequential(nn.Flatten()).eval(), (2,), leaf_types())
    graph.nodes[-1].args = (graph.input, complex(1, 2))
    with pytest.raises(ValueError, match=r"expected arguments that a digest can cover, got complex"):
        model_digest(graph)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_digest_of_an_input_is_that_of_type_shape_and_bytes(dtype):
    x = torch.arange(12, dtype=dtype).reshape(2, 2, 3).transpose(1, 2)
    head = f"speccert-input-1\n{str(dtype)[6:]}\n3,2\n".encode()
    raw = [bytes(row.contiguous().view(torch.uint8).flatten().tolist()) for row in x]
    assert input_digests(x) == ["sha256:" + hashlib.sha256(head + bytes_).hexdigest() for bytes_ in raw]


def test_digests_of_inputs_tell_type_shape_and_bits_apart():
    zero = torch.zeros(1, 4)
    others = [zero.double(), zero.reshape(1, 2, 2), -zero, torch.nextafter(zero, torch.ones(1))]
    assert len({input_digests(x)[0] for x in (zero, *others)}) == 5
    assert input_digests(torch.zeros(3, 4)) == input_digests(zero) * 3
