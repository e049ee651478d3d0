"""The model under attack: checked and counted queries, and a context that leaves everything as it was found."""

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Victim:
    """Evaluates a model, counts the evaluations and refuses outputs on which no attack can be judged.

    Attributes:
        forwards: number of inputs evaluated so far.
        gradients: number of input gradients taken so far (one input, one backward pass).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.forwards = 0
        self.gradients = 0

    def logits(self, x: Tensor) -> Tensor:  # x: (B, ...); returns (B, K)
        """Return the model's logits at `x`.

        Raises:
            ValueError: if they are not a finite floating-point (B, K) tensor with K >= 2.
        """
        logits = self.model(x.clone())  # a model may normalise its input in place, which must not move the sample
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x) or logits.shape[1] < 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"model must return logits of shape ({len(x)}, K) with K >= 2, got {got}")
        if not logits.is_floating_point():
            raise ValueError(f"model must return floating-point logits, got {logits.dtype}")
        finite = torch.isfinite(logits).all(dim=1)
        if not bool(finite.all()):
            raise ValueError(f"model must return finite logits, got NaN or inf for {int((~finite).sum())} of {len(x)}")
        self.forwards += len(x)
        return logits

    def seen_gradient(self, gradient: Tensor) -> None:  # gradient: (B, ...)
        """Count one gradient for each row of `gradient`.

        Raises:
            ValueError: if it holds NaN or inf.
        """
        if not bool(torch.isfinite(gradient).all()):
            raise ValueError("model must have finite input gradients, got NaN or inf")
        self.gradients += len(gradient)

    def traced(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return (z as a leaf, the logits there with the graph that leads back to it).

        Raises:
            ValueError: if autograd knows no way from the logits back to z.
        """
        z = z.detach().requires_grad_()
        logits = self.logits(z)
        if not logits.requires_grad:
            raise ValueError("model must return logits that autograd can trace to x; square and spsa need no gradient")
        return z, logits

    def gradient(self, z: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return (logits at z, gradient at z of the summed `loss(logits)`), both detached."""
        z, logits = self.traced(z)
        (gradient,) = torch.autograd.grad(loss(logits).sum(), z)
        self.seen_gradient(gradient)
        return logits.detach(), gradient


class Tamed(nn.Module):
    """The model, with a gradient of 0 where autograd gives none or one that is not finite: attacks run to their end.

    Attributes:
        notes: what has been tamed so far, in words, in the order it came.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.notes: dict[str, None] = {}

    def forward(self, x: Tensor) -> Tensor:  # x: (B, ...); returns (B, K)
        """Return the model's logits."""
        if not x.requires_grad:
            return self.model(x)  # type: ignore[no-any-return]
        inner = x.view_as(x)
        inner.register_hook(self._finite)  # type: ignore[no-untyped-call]
        logits: Tensor = self.model(inner)
        if logits.requires_grad:
            return logits
        self.notes["model: autograd gives no input gradients; taken for 0, so only square and spsa can judge it"] = None
        return logits + 0 * x.flatten(1).sum(1, keepdim=True).to(logits.dtype)

    def _finite(self, gradient: Tensor) -> Tensor:
        if bool(torch.isfinite(gradient).all()):
            return gradient
        self.notes["model: some input gradients are NaN or inf; these entries were taken for 0"] = None
        return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def derived_seed(seed: int, *parts: object) -> int:
    """Return a seed in [0, 2^32) that depends on `seed` and the text of `parts`, the same in every process."""
    text = "\n".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


@contextmanager
def undisturbed(model: nn.Module, seed: int) -> Iterator[None]:
    """Run the block with `model` in eval mode, its tensors frozen and all generators seeded; then restore it all.

    Restored: the mode of every submodule, `requires_grad` of every parameter and buffer, and the states of
    Python's, NumPy's and torch's (CPU and CUDA) generators. No `.grad` is written: only the input needs one.
    """
    frozen = [
        t for t in (*model.parameters(), *model.buffers()) if t.requires_grad and t.is_leaf and not t.is_inference()
    ]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  the global one is what may be used
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad(), _eval_mode(model):
        try:
            for tensor in frozen:
                tensor.requires_grad_(False)
            seed_all(seed)
            # The weights do not change during an attack: compute each parametrized one once.
            with parametrize.cached():
                yield
        finally:
            for tensor in frozen:
                tensor.requires_grad_(True)
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        if any(training for _, training in modes):
            model.eval()
        yield
    finally:
        if modes[0][1]:
            model.train()
        for module, training in modes:
            module.training = training
