import contextlib
import copy
import types

import pytest
import torch
from oracles import Wired, assert_sound, random, randomised
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

from speccert.certify import lipschitz


def wired(function, *, buffers=None, **modules):
    return randomised(Wired(function, buffers, **modules)).double()


def refuse(model, shape, message):
    with pytest.raises(ValueError, match=message) as caught:
        lipschitz(model, shape)
    assert len(str(caught.value).splitlines()) == 1


class TwoInputs(nn.Module):
    def forward(self, x, y):
        return x + y


class OwnForward(nn.Linear):
    def forward(self, x):
        return 100 * super().forward(x)


class OnlyNamed(nn.Linear):
    pass


BRANCHES = {
    "on the data": lambda m, x: m.fc(x) if x.sum() > 0 else x,
    "on the shape's proxy": lambda m, x: m.fc(x) if x.shape[1] > 100 else x,
    "in a loop": lambda m, x: sum(m.fc(row) for row in x),
    "by length": lambda m, x: m.fc(x) * len(x),
    "as a number": lambda m, x: m.fc(x) * float(x.sum()),
    "by range": lambda m, x: sum(m.fc(x) for _ in range(x.shape[1])),
}


@pytest.mark.parametrize("function", BRANCHES.values(), ids=BRANCHES)
def test_control_flow_that_depends_on_data_is_refused(function):
    refuse(wired(function, fc=nn.Linear(3, 3)), (3,), "can't be traced")


DATA_AS_CONSTANT = {
    "item of the sum": lambda m, x: m.fc(x) * x.sum().item(),
    "equal": lambda m, x: m.fc(x) * (1 + 100 * torch.equal(x, m.zero)),
    "allclose": lambda m, x: m.fc(x) * (1 + 100 * torch.allclose(x, m.zero)),
    "allclose as a method": lambda m, x: m.fc(x) * (1 + 100 * x.allclose(m.zero)),
    "list": lambda m, x: m.fc(x) * x.flatten().tolist()[0],
    "nonzero": lambda m, x: m.fc(x) * x.nonzero().shape[0],
    "largest": lambda m, x: m.fc(x) * x.max(),
    "count": lambda m, x: m.fc(x) + torch.count_nonzero(x),
}


@pytest.mark.parametrize("function", DATA_AS_CONSTANT.values(), ids=DATA_AS_CONSTANT)
def test_numbers_read_from_the_data_are_no_constants(function):
    refuse(wired(function, fc=nn.Linear(3, 3), buffers={"zero": torch.zeros(1, 3)}), (3,), "expected|no Lipschitz rule")


MIXED_BATCH = {
    "mean over samples": lambda m, x: m.fc(x - x.mean(0)),
    "mean over samples, kept": lambda m, x: m.fc(x) + x.mean(0, keepdim=True),
    "flatten from the batch on": lambda m, x: m.fc(x).flatten(0),
    "view across samples": lambda m, x: m.fc(x).view(-1, 1),
    "view of another batch": lambda m, x: m.fc(x).reshape(1, -1),
    "transpose": lambda m, x: m.fc(x).t(),
    "roll": lambda m, x: m.fc(x).roll(1, 0),
    "sum": lambda m, x: torch.sum(m.fc(x), 0),
    "concatenation of the batch": lambda m, x: torch.cat([m.fc(x), x]),
    "batch as factor": lambda m, x: m.fc(x) * x.shape[0],
    "over the batch": lambda m, x: m.fc(x) / x.size(0),
}


@pytest.mark.parametrize("function", MIXED_BATCH.values(), ids=MIXED_BATCH)
def test_operations_across_samples_are_refused(function):
    refuse(wired(function, fc=nn.Linear(3, 3)), (3,), "expected|no Lipschitz rule")


@pytest.mark.parametrize(
    "layer", [nn.Flatten(0), nn.Unflatten(0, (5, 1)), nn.Flatten(0, 1)], ids=["flatten", "unflatten", "flatten-0-1"]
)
def test_layers_that_reshape_the_batch_are_refused(layer):
    refuse(nn.Sequential(layer, nn.Flatten(1)).eval(), (3, 4), "expected|does not fit|not supported|shape")


OUTPUTS = {
    "tuple": lambda m, x: (m.fc(x), x),
    "dict": lambda m, x: {"logits": m.fc(x)},
    "list": lambda m, x: [m.fc(x)],
    "constant": lambda m, x: m.fc.bias * 2,
    "nothing": lambda m, x: None,
    "a number": lambda m, x: 3.0,
}


@pytest.mark.parametrize("function", OUTPUTS.values(), ids=OUTPUTS)
def test_outputs_other_than_one_tensor_are_refused(function):
    refuse(wired(function, fc=nn.Linear(3, 3)), (3,), "the model")


def test_several_inputs_are_refused():
    refuse(TwoInputs().eval(), (3,), "one input")


@pytest.mark.parametrize("shape", [(3, 4), (3, 1), (3,)])
def test_outputs_other_than_logits_are_refused(shape):
    model = nn.Sequential(nn.Linear(shape[-1], 1) if len(shape) == 1 else nn.Identity()).eval()
    refuse(model, shape, "logits")


IN_PLACE = {
    "iadd seen through another name": lambda m, x: _double_after_iadd(m, x),
    "rectifier on a tensor in use": lambda m, x: _after(m, x, lambda a: functional.relu(a, inplace=True)),
    "elu on a tensor in use": lambda m, x: _after(m, x, m.elu),
    "elu on a view of a tensor in use": lambda m, x: _after(m, x, lambda a: m.elu(a.flatten(1))),
    "mul_": lambda m, x: _after(m, x, lambda a: a.mul_(3)),
    "add_": lambda m, x: _after(m, x, lambda a: a.add_(x)),
    "relu_": lambda m, x: _after(m, x, lambda a: a.relu_()),
    "out": lambda m, x: torch.mul(m.fc(x), 3.0, out=m.store) + m.store,
    "assignment": lambda m, x: _assigned(m, x),
    "the input itself": lambda m, x: m.fc(m.elu(x)),
}


def _double_after_iadd(m, x):
    a = m.fc(x)
    b = a
    a += x
    return b + a


def _after(m, x, change):
    a = m.fc(x)
    b = change(a)
    return a + b


def _assigned(m, x):
    a = m.fc(x)
    a[:, 0] = 100 * x[:, 0]
    return a


@pytest.mark.parametrize("function", IN_PLACE.values(), ids=IN_PLACE)
def test_in_place_changes_of_tensors_in_use_are_refused_or_bounded(function):
    """A trace forgets that two names are one tensor."""
    model = wired(function, fc=nn.Linear(3, 3), elu=nn.ELU(5.0, inplace=True), buffers={"store": torch.zeros(6, 3)})
    with contextlib.suppress(ValueError):
        assert_sound_in_place(model)


def assert_sound_in_place(model):
    x, other = random(6, 3), random(6, 3, seed=2)
    bound = lipschitz(model, (3,))
    change = model(x.clone()) - model(other.clone())
    assert bool((change.norm(dim=1) <= bound.upper * (x - other).norm(dim=1) * (1 + 1e-9)).all())


class Unseen(nn.Module):
    """A forward pass with something that a trace does not record."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.calls = kind, 0
        self.a, self.b = nn.Linear(16, 2), nn.Linear(16, 2)
        with torch.no_grad():
            self.b.weight.mul_(0.01)

    def forward(self, x):
        if self.kind == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                small = self.b(x)
            return self.a(x) + small
        if self.kind == "random":
            return self.a(x) + 1e-5 * torch.randn(2)
        self.calls += 1
        return self.a(x) * (1 + 1e-5 * self.calls)


@pytest.mark.parametrize("kind", ["autocast", "random", "counted"])
def test_what_a_trace_leaves_out_is_refused_however_small(kind):
    """The tolerance of rounding between batch sizes once hid them."""
    refuse(randomised(Unseen(kind)).eval(), (16,), "to the last bit")


def test_outputs_that_lean_on_the_batch_size_are_refused():
    refuse(wired(lambda m, x: m.fc(x) * x.shape[0], fc=nn.Linear(3, 3)), (3,), "depend on the other samples")


def test_usual_in_place_layers_are_accepted():
    def block(m, x):
        out = m.conv(m.act(m.conv(x)))
        out += x
        return m.fc(m.act(out).flatten(1))

    conv, fc = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(32, 3)
    assert_sound(wired(block, conv=conv, fc=fc, act=nn.ReLU(inplace=True)), (2, 4, 4))
    assert_sound(wired(lambda m, x: m.fc(functional.relu(m.fc(x), inplace=True)), fc=nn.Linear(3, 3)), (3,))


def hooked(kind):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval()
    getattr(model[0], kind)(lambda *arguments: None)
    return model


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_refused(kind):
    refuse(hooked(kind), (3,), r"0 \(torch.nn.modules.linear.Linear\).*hook")


def test_replaced_forward_is_refused():
    model = nn.Sequential(nn.Linear(3, 3)).eval()
    model[0].forward = lambda x: 100 * x
    refuse(model, (3,), "forward of its class")


def test_replaced_convolution_core_is_refused():
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten()).eval()
    model[0]._conv_forward = types.MethodType(lambda self, x, w, b: 100 * functional.conv1d(x, w, b), model[0])
    refuse(model, (1, 3), "forward of its class")


def test_subclass_with_its_own_forward_inherits_no_rule():
    layer = OwnForward(3, 3).double().eval()
    layer_norm = torch.linalg.matrix_norm(layer.weight.detach(), 2)
    model = nn.Sequential(layer).double().eval()
    try:
        bound = lipschitz(model, (3,)).upper
    except ValueError:
        return
    assert bound >= 100 * layer_norm


def test_subclass_that_changes_nothing_is_looked_into():
    layer = OnlyNamed(4, 3).double().eval()
    assert lipschitz(layer, (4,)).upper == pytest.approx(float(torch.linalg.matrix_norm(layer.weight.detach(), 2)))


@pytest.mark.parametrize("inner", [False, True])
def test_training_mode_is_refused_and_left_as_found(inner):
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Dropout(0.5)))
    model.eval()
    (model[1][0] if inner else model).train()
    modes = [module.training for module in model.modules()]
    refuse(model, (3,), "training mode")
    assert [module.training for module in model.modules()] == modes


def test_modules_outside_the_model_are_refused():
    hidden = [nn.Linear(3, 3)]
    refuse(Wired(lambda m, x: hidden[0](x)).eval(), (3,), "can't be traced|registered|submodule")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_models_are_refused():
    refuse(torch.compile(nn.Sequential(nn.Linear(3, 3)).eval()), (3,), "forward of its class|hook")


@pytest.mark.parametrize("shape", [(4,), (3, 3, 3), (2, 2, 2, 2, 2), ()])
def test_shapes_that_do_not_fit_are_refused(shape):
    model = randomised(nn.Sequential(nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(8, 3)))
    refuse(model, shape, "fit|expected")


@pytest.mark.parametrize("function", [lambda m, x: m.fc(x).mean(5), lambda m, x: torch.cat([x, m.fc(x)], 7)])
def test_errors_inside_the_model_become_one_line(function):
    refuse(wired(function, fc=nn.Linear(3, 3)), (3,), "fit|expected")


def test_integer_tensors_are_refused():
    refuse(wired(lambda m, x: m.fc(x).view(torch.int64) * 1.0, fc=nn.Linear(3, 3)), (3,), "expected|no Lipschitz rule")


def test_constants_are_folded():
    model = wired(
        lambda m, x: m.fc(x * m.scale.exp() + (m.scale * 2).tanh()) / (1 + m.scale.abs().sum()),
        fc=nn.Linear(3, 4),
        buffers={"scale": random(3)},
    )
    exact = model.fc.weight.detach() * model.scale.exp() / (1 + model.scale.abs().sum())
    assert lipschitz(model, (3,)).upper == pytest.approx(float(torch.linalg.matrix_norm(exact, 2)), rel=1e-8)


def test_parameter_lists_are_constants():
    model = Wired(lambda m, x: m.fc(x * m.scales[0] * m.scales[1]), fc=nn.Linear(3, 4))
    model.scales = nn.ParameterList([torch.full((3,), 2.0), torch.full((), 3.0)])
    exact = 6 * torch.linalg.matrix_norm(model.fc.weight.detach().double(), 2)
    assert lipschitz(model.eval(), (3,)).upper == pytest.approx(float(exact), rel=1e-8)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_parametrized_weights_are_read_wherever_they_are_used():
    layer = nn.Linear(3, 4)
    parametrize.register_parametrization(layer, "weight", Doubled())
    exact = float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2))
    for model in (nn.Sequential(layer), Wired(lambda m, x: functional.linear(x, m.fc.weight), fc=layer)):
        assert lipschitz(model.eval(), (3,)).upper == pytest.approx(exact, rel=1e-8)


def test_parametrized_containers_have_no_rule():
    model = nn.Sequential(nn.Linear(3, 3))
    model.register_parameter("spare", nn.Parameter(torch.ones(2)))
    parametrize.register_parametrization(model, "spare", Doubled())
    model.eval()
    try:
        bound = lipschitz(nn.Sequential(model).eval(), (3,)).upper
    except ValueError:
        return
    assert bound >= float(torch.linalg.matrix_norm(model[0].weight.detach(), 2))


def test_tracing_leaves_the_model_as_it_was():
    layer = nn.Linear(3, 4)
    parametrize.register_parametrization(layer, "weight", Doubled())
    tensor = torch.full((3,), 2.0)
    model = Wired(lambda m, x: functional.linear(x * tensor, m.fc.weight), fc=layer).eval()
    names = {name: set(vars(module)) for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    for _ in range(2):
        lipschitz(model, (3,), points=torch.zeros(2, 3))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == names
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_an_input_that_is_not_used_is_an_error():
    refuse(wired(lambda m, x: m.fc(torch.ones(5, 3).double()), fc=nn.Linear(3, 3)), (3,), "does not depend")


def test_nan_in_a_buffer_is_named():
    model = wired(lambda m, x: m.fc(x) * m.scale, fc=nn.Linear(3, 3), buffers={"scale": torch.tensor(float("nan"))})
    refuse(model, (3,), "scale")


@pytest.mark.parametrize("place", ["end", "middle"])
def test_an_operation_in_a_coarser_type_is_refused(place):
    """A float32 certificate once covered a mean taken in bfloat16."""

    def forward(m, x):
        pooled = m.conv(x).mean((2, 3), dtype=torch.bfloat16)
        return pooled if place == "end" else m.fc(pooled * torch.ones(3))

    model = randomised(Wired(forward, conv=nn.Conv2d(1, 3, 1), fc=nn.Linear(3, 3)))
    refuse(model, (1, 4, 4), "no coarser than torch.float32, got torch.bfloat16|a mean with no arguments")


def test_outputs_that_lean_on_a_larger_batch_are_refused():
    refuse(wired(lambda m, x: m.fc(x) * (1 + x.shape[0] // 6), fc=nn.Linear(3, 3)), (3,), "depend on the other samples")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: setattr(layer, "_call_impl", lambda x: x), "the _call_impl of its class"),
        (lambda layer: layer.compile(backend="eager"), "not compiled"),
        (lambda layer: setattr(layer, "kernel_size", (1, 1)), "its channels and kernel size"),
        (lambda layer: setattr(layer, "_reversed_padding_repeated_twice", [0, 2, 2, 0]), "to pad by its padding"),
    ],
)
def test_layers_that_were_tampered_with_are_refused(change, message):
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(32, 2)).eval()
    change(model[0])
    refuse(model, (1, 4, 4), message)
