"""Data sets: `digits` (embedded), MNIST, Fashion-MNIST, CIFAR-10, `.npz` files and `module:function` loaders.

Inputs are float32 in [0, 1] and are never normalised here: normalisation is a layer of the model, so that every radius
and eps is in pixel units.
"""

import dataclasses
import functools
import importlib
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .download import SOURCES, DataError, read_files

_Arrays: TypeAlias = dict[str, NDArray[Any]]

_REQUIRED = ("x_train", "y_train", "x_test", "y_test")
_OPTIONAL = ("x_val", "y_val")
_DIGITS_TEST_FRACTION = 0.2
_CIFAR_ROW_BYTES = 1 + 3 * 32 * 32


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Inputs and labels of one part of a data set."""

    x: Tensor  # N x C x H x W or N x D, float32 in [0, 1]
    y: Tensor  # N, int64 in 0 … K-1

    def __len__(self) -> int:
        return len(self.y)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Three disjoint parts, and what a model must know about them.

    `mean` and `std` hold one value a channel over the train part (one value in all for flat inputs, and a std of 1
    for a constant channel).
    """

    name: str
    train: Split
    validation: Split
    test: Split
    input_shape: tuple[int, ...]  # C, H, W or D
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_dataset(
    name: str,
    *,
    root: str | Path | None = None,
    seed: int = 0,
    validation_fraction: float = 0.1,
    train_samples: int | None = None,
    test_samples: int | None = None,
) -> Dataset:
    """Load a data set and split it; equal arguments give equal parts in equal order.

    The test part is the official one (for `digits` a fixed fifth), whatever the seed. The validation part is drawn
    with `seed` from the official train part, class by class, unless the data bring their own. A subset is drawn
    with `seed` after the split.

    Args:
        name: "digits", "mnist", "fashion-mnist", "cifar10", a path ending in .npz, or "module:function". The last two
            give arrays x_train, y_train, x_test, y_test and, where wanted, x_val, y_val: x is N x C x H x W or
            N x D, float in [0, 1] or uint8 in 0 … 255; y holds integers 0 … K-1. A function may return a `Dataset`.
        root: folder of the public data sets; else the variable SPECCERT_DATA, else a cache folder of the user. What
            is missing there is downloaded.
        seed: >= 0, of the split and the subsets; the global random state is not used.
        validation_fraction: share of the train part, in (0, 1).
        train_samples: size of the train subset, >= 1; all if None.
        test_samples: size of the test subset, >= 1; all if None.

    Raises:
        DataError: an unknown name; a missing, damaged or wrong file; arrays that break the rules above.
        ValueError: an argument out of range.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be in (0, 1), got {validation_fraction!r}")
    arrays = _check(name, _load_arrays(name, root))
    if "x_val" not in arrays:
        chosen = _stratified(arrays["y_train"], validation_fraction, np.random.default_rng([seed, 0]))
        arrays |= {f"{axis}_val": arrays[f"{axis}_train"][chosen] for axis in "xy"}
        arrays |= {f"{axis}_train": arrays[f"{axis}_train"][~chosen] for axis in "xy"}
    num_classes = int(arrays["y_train"].max()) + 1
    train = _split(arrays, "train", train_samples, np.random.default_rng([seed, 1]))
    validation = _split(arrays, "val", None, np.random.default_rng(seed))
    test = _split(arrays, "test", test_samples, np.random.default_rng([seed, 2]))
    mean, std = _moments(train.x)
    return Dataset(name, train, validation, test, tuple(train.x.shape[1:]), num_classes, mean, std)


def _load_arrays(name: str, root: str | Path | None) -> Mapping[str, Any]:
    if name == "digits":
        return _digits()
    if name in SOURCES:
        files = read_files(name, root)
        return _cifar_arrays(files) if name == "cifar10" else _idx_arrays(files)
    if name.endswith(".npz"):
        return _npz_arrays(Path(name))
    if ":" in name:
        return _function_arrays(name)
    raise DataError(f"unknown data set {name!r}, expected digits, {', '.join(SOURCES)}, a .npz path or module:function")


@functools.cache  # every seed splits the same arrays anew
def _digits() -> _Arrays:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = bunch.images[:, None] / 16.0, bunch.target
    test = _stratified(y, _DIGITS_TEST_FRACTION, np.random.default_rng(0))
    return {"x_train": x[~test], "y_train": y[~test], "x_test": x[test], "y_test": y[test]}


def _idx_arrays(files: Mapping[str, bytes]) -> _Arrays:
    names = {"train": "train", "test": "t10k"}
    images = {f"x_{part}": read_idx(files[f"{name}-images-idx3-ubyte"])[:, None] for part, name in names.items()}
    labels = {f"y_{part}": read_idx(files[f"{name}-labels-idx1-ubyte"]) for part, name in names.items()}
    return images | labels


def read_idx(content: bytes) -> NDArray[np.uint8]:
    """Array in an IDX file of unsigned bytes: two zero bytes, type 8, number of axes, big-endian sizes, values.

    Raises:
        DataError: not an IDX file of bytes, or of the wrong length.
    """
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(f"expected an IDX file of unsigned bytes (00 00 08 …), got {content[:4].hex(' ')!r}")
    axes = content[3]
    start = 4 + 4 * axes
    if len(content) < start:
        raise DataError(f"IDX header is cut: expected {start} bytes, got {len(content)}")
    shape = struct.unpack(f">{axes}I", content[4:start])
    expected = start + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise DataError(f"IDX file of shape {shape}: expected {expected} bytes, got {len(content)}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _cifar_arrays(files: Mapping[str, bytes]) -> _Arrays:
    train = [read_cifar(files[f"data_batch_{batch}.bin"]) for batch in range(1, 6)]
    x_test, y_test = read_cifar(files["test_batch.bin"])
    x_train, y_train = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def read_cifar(content: bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images (N x 3 x 32 x 32) and labels (N) of a CIFAR-10 binary batch: rows of 1 label and 3072 pixel bytes.

    Raises:
        DataError: the length is not a whole number of rows.
    """
    if not content or len(content) % _CIFAR_ROW_BYTES:
        raise DataError(f"CIFAR-10 batch: expected rows of {_CIFAR_ROW_BYTES} bytes, got {len(content)} bytes")
    rows = np.frombuffer(content, np.uint8).reshape(-1, _CIFAR_ROW_BYTES)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]


def _npz_arrays(path: Path) -> _Arrays:
    try:
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            arrays = {key: file[key] for key in file.files} if isinstance(file, np.lib.npyio.NpzFile) else None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read as .npz without pickle ({error})") from error
    if arrays is None:
        raise DataError(f"{path}: expected an .npz archive of named arrays, got a single array")
    return arrays


def _function_arrays(name: str) -> Mapping[str, Any]:
    module_name, function_name = name.split(":", 1)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise DataError(f"data set {name!r}: {error}; expected module:function of an importable module") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise DataError(f"data set {name!r}: module {module_name} has no function {function_name}")
    loaded = function()
    if isinstance(loaded, Dataset):
        parts = {"train": loaded.train, "val": loaded.validation, "test": loaded.test}
        return {f"{axis}_{part}": getattr(split, axis) for part, split in parts.items() for axis in "xy"}
    if not isinstance(loaded, Mapping):
        raise DataError(f"data set {name!r}: expected a dict of arrays or a Dataset, got {type(loaded).__name__}")
    return loaded


def _check(name: str, loaded: Mapping[str, Any]) -> _Arrays:
    """Refuse arrays that break a rule, so that no later step has to."""
    missing = [key for key in _REQUIRED if key not in loaded]
    missing += [key for key in _OPTIONAL if key not in loaded and any(other in loaded for other in _OPTIONAL)]
    unknown = [str(key) for key in loaded if key not in _REQUIRED + _OPTIONAL]
    if missing or unknown:
        raise DataError(
            f"data set {name!r}: expected arrays {', '.join(_REQUIRED)} and perhaps {', '.join(_OPTIONAL)}"
            + (f"; missing {', '.join(missing)}" if missing else "")
            + (f"; unknown {', '.join(unknown)}" if unknown else "")
        )
    arrays = {key: np.asarray(value) for key, value in loaded.items()}
    parts = ("train", "test", "val") if "x_val" in arrays else ("train", "test")
    problems = [text for part in parts for text in _problems(part, arrays[f"x_{part}"], arrays[f"y_{part}"])]
    if not problems:
        problems = _clashes(parts, arrays)
    if problems:
        raise DataError(f"data set {name!r}: {'; '.join(problems)}")
    return arrays


def _problems(part: str, x: NDArray[Any], y: NDArray[Any]) -> list[str]:
    found = []
    if x.ndim not in (2, 4) or 0 in x.shape:
        found.append(f"x_{part} has shape {x.shape}, expected N x C x H x W or N x D, none of them 0")
    elif x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        found.append(f"x_{part} is {x.dtype}, expected floats in [0, 1] or uint8")
    elif x.dtype != np.uint8 and not (np.isfinite(x).all() and x.min() >= 0 and x.max() <= 1):
        found.append(f"x_{part} spans {x.min():g} … {x.max():g}, expected finite values in [0, 1]")
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        found.append(f"y_{part} is {y.dtype} of shape {y.shape}, expected N integers")
    elif len(y) != len(x):
        found.append(f"x_{part} has {len(x)} rows but y_{part} {len(y)}")
    return found


def _clashes(parts: tuple[str, ...], arrays: _Arrays) -> list[str]:
    classes, shape = np.unique(arrays["y_train"]), arrays["x_train"].shape[1:]
    found = []
    if len(classes) < 2 or not np.array_equal(classes, np.arange(len(classes))):
        found.append(f"y_train holds {classes[:12].tolist()}, expected every label 0 … K-1 with K >= 2")
    for part in parts[1:]:
        if arrays[f"x_{part}"].shape[1:] != shape:
            found.append(f"x_{part} has inputs of shape {arrays[f'x_{part}'].shape[1:]} but x_train {shape}")
        if foreign := sorted(set(np.unique(arrays[f"y_{part}"]).tolist()) - set(classes.tolist())):
            found.append(f"y_{part} holds labels {foreign[:12]} that y_train has not")
    return found


def _stratified(y: NDArray[Any], fraction: float, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Mask of a random share of each class, rounded to the nearest count."""
    chosen = np.zeros(len(y), dtype=bool)
    for label in np.unique(y):
        members = generator.permutation(np.flatnonzero(y == label))
        chosen[members[: round(fraction * len(members))]] = True
    if not chosen.any() or chosen.all():
        raise ValueError(f"validation_fraction {fraction:g} of {len(y)} samples leaves a part empty")
    return chosen


def _split(arrays: _Arrays, part: str, samples: int | None, generator: np.random.Generator) -> Split:
    x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
    if samples is not None:
        if not 1 <= samples <= len(y):
            raise ValueError(f"{part}_samples must be in 1 … {len(y)}, got {samples}")
        chosen = np.sort(generator.permutation(len(y))[:samples])
        x, y = x[chosen], y[chosen]
    pixels = x.astype(np.float32) / np.float32(255) if x.dtype == np.uint8 else x.astype(np.float32)
    return Split(torch.from_numpy(pixels), torch.from_numpy(y.astype(np.int64)))


def _moments(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation of each channel, summed in float64."""
    channels = x.transpose(0, 1).flatten(1) if x.ndim == 4 else x.reshape(1, -1)
    values = [channel.double() for channel in channels]
    std = [value.std(correction=0).item() for value in values]
    return tuple(value.mean().item() for value in values), tuple(one if one > 0 else 1.0 for one in std)
