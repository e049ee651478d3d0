import itertools
import math
import time

import pytest
import torch
from torch import nn

from speccert.experiments.config import CellConfig
from speccert.experiments.data import Split
from speccert.experiments.fitting import Fitter, NonFiniteError, seeded

CPU = torch.device("cpu")


class Recorder(nn.Module):
    """Softmax regression on one input, the number of the sample, that notes what it saw."""

    def __init__(self):
        super().__init__()
        self.linear, self.seen = nn.Linear(1, 3), []

    def forward(self, x):
        self.seen.append(x.flatten().tolist())
        return self.linear(x)


def fitter(model=None, samples=20, **settings):
    split = Split(torch.arange(float(samples))[:, None], torch.arange(samples) % 3)
    config = CellConfig(**{"loss": "cross-entropy", "batch_size": 8, "lr": 1e-3, **settings})
    return Fitter(model or Recorder(), config, split)


def test_every_epoch_sees_every_sample_once_in_an_order_of_its_own():
    recorder = Recorder()
    run = fitter(recorder)
    for number in (1, 2):
        run.epoch(number)
    sizes = [len(batch) for batch in recorder.seen]
    assert sizes == [8, 8, 4, 8, 8, 4]
    orders = [list(itertools.chain(*batches)) for batches in (recorder.seen[:3], recorder.seen[3:])]
    assert [sorted(order) for order in orders] == [list(range(20))] * 2
    assert orders[0] != orders[1]


def test_seed_and_epoch_alone_set_the_order():
    def order(seed, numbers):
        recorder = Recorder()
        run = fitter(recorder, seed=seed)
        for number in numbers:
            run.epoch(number)
        return recorder.seen[-3:]

    assert order(0, [1, 2, 3]) == order(0, [3])
    assert order(0, [3]) != order(1, [3])


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_dropout_is_seeded_and_the_global_generator_is_left_alone(seed):
    weights = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(), nn.Linear(8, 3))
        before = torch.random.get_rng_state()
        fitter(model, seed=seed).epoch(1)
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.rand(5)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_seeded_puts_the_generator_back_after_an_error():
    before = torch.random.get_rng_state()

    def interrupted():
        with seeded(3, CPU):
            torch.rand(3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(torch.random.get_rng_state(), before)


def one_full_batch(lr, clip):
    """Numbers of one SGD step on softmax regression, by hand."""
    model = nn.Linear(2, 3)
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    y = torch.arange(30) % 3
    with torch.no_grad():
        errors = model(x).double().softmax(1) - nn.functional.one_hot(y, 3)
        gradients = [errors.T @ x.double() / 30, errors.mean(0)]
        before = [p.double() for p in model.parameters()]
        loss = -model(x).double().log_softmax(1)[torch.arange(30), y].mean()
        hits = (model(x).argmax(1) == y).double().mean()
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    config = CellConfig(
        loss="cross-entropy", temperature=1.0, optimizer="sgd", momentum=0.0, schedule="constant", lr=lr,
        gradient_clip=clip, batch_size=30,
    )  # fmt: skip
    row = Fitter(model, config, Split(x, y)).epoch(1)
    scale = lr * min(1.0, clip / norm if clip else 1.0)
    after = [w - scale * g for w, g in zip(before, gradients, strict=True)]
    return row, model, norm, loss.item(), hits.item(), after


@pytest.mark.parametrize("clip", [None, 1e-2, 1e6])
def test_one_step_is_the_formula_and_is_logged_before_clipping(clip):
    row, model, norm, loss, hits, after = one_full_batch(0.3, clip)
    assert row["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    assert row["train_loss"] == pytest.approx(loss, rel=1e-5)
    assert row["train_accuracy"] == pytest.approx(hits)
    assert row["lr"] == 0.3
    for found, expected in zip(model.parameters(), after, strict=True):
        torch.testing.assert_close(found.detach().double(), expected, atol=1e-5, rtol=1e-4)


def test_step_time_is_the_median_in_seconds():
    class Slow(Recorder):
        def forward(self, x):
            time.sleep(0.5 if not self.seen else 0.02)
            return super().forward(x)

    assert 0.02 <= fitter(Slow(), samples=40).epoch(1)["step_s"] < 0.2


def test_a_loss_that_is_not_finite_stops_within_a_step():
    recorder = Recorder()
    nn.init.constant_(recorder.linear.weight, math.inf)
    with pytest.raises(NonFiniteError, match="the loss or the gradient is not finite"):
        fitter(recorder).epoch(1)
    assert len(recorder.seen) == 1


def test_a_loss_that_is_not_finite_in_the_last_step_is_noticed():
    recorder = Recorder()
    nn.init.constant_(recorder.linear.weight, math.inf)
    with pytest.raises(NonFiniteError):
        fitter(recorder, batch_size=20).epoch(1)


def test_frozen_parameters_stay():
    model = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    before = [p.clone() for p in model.parameters()]
    fitter(model, weight_decay=0.1).epoch(1)
    after = list(model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before[:2], after[:2], strict=True))
    assert not torch.equal(before[2], after[2])
