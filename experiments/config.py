"""What one run is: every setting that changes its result, checked when it is built.

`CellConfig` is one training with its evaluation; its hash names the run folder. `RunSpec` spans a grid of cells
from lists of constraints, thresholds and seeds. Where the data lie, the device, the output folder and the number of
jobs are not part of a config, since they must not change its id.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

DATASETS = ("digits", "mnist", "fashion-mnist", "cifar10")
ACTIVATIONS = (
    "abs",
    "gelu",
    "groupsort",
    "householder",
    "identity",
    "leaky-relu",
    "maxmin",
    "relu",
    "sigmoid",
    "silu",
    "softplus",
    "tanh",
)
MODELS = ("mlp", "convnet-4c3f", "convnet-6c2f", "lipconvnet", "liresnet")
BASELINES = ("none", "weight-decay", "gradient-clip")
CONSTRAINTS = ("cap", "clip", "orthogonal", "orthogonal-bjorck", "orthogonal-projected", "penalty", *BASELINES)
LOSSES = ("cross-entropy", "margin", "offset-ce", "gloro", "emma")
NORMS = ("l2", "linf", "l1")
ATTACK_NORMS = {  # as the attacks themselves have it, which torch-free code can't ask
    "fgsm": ("l2", "linf"),
    "pgd": ("l2", "linf"),
    "autoattack": ("l2", "linf"),
    "deepfool": NORMS,
    "cw": ("l2",),
    "ddn": ("l2",),
    "fmn": NORMS,
}
ATTACKS = tuple(ATTACK_NORMS)
BOUNDS = ("product",)

_FORMAT = 1  # raise it when a field changes meaning: ids then change and no old run is taken for a new one
_LOCATION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_GRID = {"constraint": "constraints", "threshold": "thresholds", "seed": "seeds"}
_BASELINE_SETTINGS: dict[str, dict[str, Any]] = {
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


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type or out of range."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellConfig:
    """One training and its evaluation; lengths (`loss_eps`, `eps`) are in raw input units, pixels in [0, 1].

    Raises:
        ConfigError: names every bad value in one line.
    """

    dataset: str = "digits"
    model: str = "mlp"
    width: int | None = None
    depth: int | None = None
    activation: str = "maxmin"
    normalise: str = "center"
    constraint: str = "cap"
    threshold: float = 1.0  # spectral norm of a layer; inf = not constrained
    seed: int = 0
    loss: str = "cross-entropy"
    loss_eps: float = 0.5  # margin radius
    loss_offset: float = 0.0  # further margin, in logit units (margin loss: raw input units)
    temperature: float = 0.1
    optimizer: str = "adamw"
    lr: float = 3e-3
    weight_decay: float = 0.0
    momentum: float = 0.9
    schedule: str = "cosine"
    warmup_epochs: int = 0
    epochs: int = 30
    batch_size: int = 64
    augment: str = "none"
    gradient_clip: float | None = None
    penalty_weight: float = 0.01
    validation_fraction: float = 0.1
    train_samples: int | None = None  # None = all
    test_samples: int | None = None
    attack_samples: int | None = None
    norm: str = "l2"
    eps: tuple[float, ...] = (0.1, 0.3, 0.5)  # kept sorted
    attacks: tuple[str, ...] = ("fgsm", "pgd", "ddn")
    bound: str = "product"
    checkpoint: str | None = None  # weights to start from (.safetensors or a torch file)

    def __post_init__(self) -> None:
        values = {key: _canonical(key, getattr(self, key)) for key in FIELDS}
        if problems := _problems(values):
            raise ConfigError("; ".join(problems))
        for key, value in values.items():
            object.__setattr__(self, key, value)

    @classmethod
    def from_json(cls, text: str) -> "CellConfig":
        """Read what `to_json` wrote; every field must be there and no other.

        Raises:
            ConfigError: not JSON, another format version, an unknown, missing or bad field.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"expected a config in JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"expected a config as a JSON object, got {type(values).__name__}")
        version = values.pop("format", None)
        if version != _FORMAT:
            raise ConfigError(f"config format {version!r} is not readable here, expected {_FORMAT}")
        problems = _unknown(values, FIELDS)
        problems += [f"{key} is missing" for key in FIELDS if key not in values]
        if problems:
            raise ConfigError("; ".join(problems))
        if values["threshold"] == "inf":
            values["threshold"] = math.inf
        return cls(**values)

    def to_json(self) -> str:
        """Text that `from_json` turns into an equal config; an infinite threshold is the string "inf"."""
        return json.dumps(_plain(self), indent=2, allow_nan=False) + "\n"


def usable_attacks(attacks: Sequence[str], norm: str) -> tuple[str, ...]:
    """Those of the attacks that know the norm; where none does, all known ones that do."""
    fit = tuple(name for name, norms in ATTACK_NORMS.items() if norm in norms)
    return tuple(name for name in attacks if name in fit) or fit


FIELDS = tuple(field.name for field in dataclasses.fields(CellConfig))


def config_id(cell: CellConfig) -> str:
    """First 12 hex digits of the SHA-256 of the config's canonical JSON: equal configs, equal ids, anywhere."""
    text = json.dumps(_plain(cell), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSpec:
    """A grid of cells: every constraint at every threshold with every seed, all else shared.

    `settings` holds the other `CellConfig` fields that were set; the rest comes from `DEFAULTS` of the data set, then
    from `CellConfig`. The baselines ("none", "weight-decay", "gradient-clip") have no threshold, so each
    is one cell a seed, at threshold inf, with its own weight decay or gradient clip where none was set.

    Raises:
        ConfigError: names every bad value in one line.
    """

    constraints: tuple[str, ...] = ("cap",)
    thresholds: tuple[float, ...] = (0.5, 0.7, 1.0, 1.5, math.inf)
    seeds: tuple[int, ...] = (0,)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = _unknown(self.settings, [key for key in FIELDS if key not in _GRID])
        for key in _GRID.values():
            values = getattr(self, key)
            if not isinstance(values, list | tuple) or not values:
                problems.append(f"{key} = {values!r}: expected a list with at least one value")
            else:
                object.__setattr__(self, key, tuple(values))
        object.__setattr__(self, "settings", dict(self.settings))
        if not problems:
            combined = (_problems(values) for values in self._grid())
            problems = list(dict.fromkeys(problem for found in combined for problem in found))
        if problems:
            raise ConfigError("; ".join(problems))

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "RunSpec":
        """Build from flat keys: the fields of `CellConfig`, of which constraint, threshold and seed may be lists.

        These three may also be named in the plural, as in the fields of this class.

        Raises:
            ConfigError: names every unknown key, with close matches and all allowed keys, or every bad value.
        """
        problems = _unknown(mapping, [*_GRID.values(), *FIELDS])
        problems += [f"set {one} or {many}, not both" for one, many in _GRID.items() if {one, many} <= set(mapping)]
        if problems:
            raise ConfigError("; ".join(problems))
        grid = {
            many: mapping[key] if isinstance(mapping[key], list | tuple) else (mapping[key],)
            for one, many in _GRID.items()
            for key in (one, many)
            if key in mapping
        }
        settings = {key: mapping[key] for key in FIELDS if key in mapping and key not in _GRID}
        return cls(**grid, settings=settings)

    @classmethod
    def from_toml(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> "RunSpec":
        """Read a TOML file of flat keys, as `from_mapping` takes them; `overrides` win over the file.

        Raises:
            ConfigError: the file cannot be read, is not TOML, or holds a bad key or value; names the file.
        """
        try:
            given = tomllib.loads(Path(path).read_text(encoding="utf-8"))
            replaced = {alias for pair in _GRID.items() if set(pair) & set(overrides or ()) for alias in pair}
            kept = {key: value for key, value in given.items() if key not in replaced}
            return cls.from_mapping({**kept, **(overrides or {})})
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: {error}") from error

    def to_toml(self) -> str:
        """Text that `from_toml` reads back as an equal grid."""
        grid = {many: getattr(self, many) for many in _GRID.values()}
        rows = {**grid, **{key: value for key, value in self.settings.items() if value is not None}}
        return "".join(f"{key} = {_toml_value(value)}\n" for key, value in rows.items())

    def cells(self) -> tuple[CellConfig, ...]:
        """All cells, without repeats, ordered by constraint, then threshold, then seed, each as listed."""
        return tuple(dict.fromkeys(CellConfig(**values) for values in self._grid()))

    def _grid(self) -> Iterable[dict[str, Any]]:
        """Complete canonical values of each cell, not yet checked."""
        shared: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(CellConfig)}
        dataset = self.settings.get("dataset", shared["dataset"])
        shared["attacks"] = usable_attacks(shared["attacks"], self.settings.get("norm", shared["norm"]))
        for constraint in self.constraints:
            baseline = _BASELINE_SETTINGS.get(constraint) if isinstance(constraint, str) else None
            defaults = {**shared, **DEFAULTS.get(str(dataset), {}), **(baseline or {})}
            for threshold in self.thresholds if baseline is None else (math.inf,):
                for seed in self.seeds:
                    cell = {"constraint": constraint, "threshold": threshold, "seed": seed}
                    values = {**defaults, **self.settings, **cell}
                    yield {key: _canonical(key, value) for key, value in values.items()}


_Rule: TypeAlias = tuple[Callable[[Any], bool], str]  # a test of a canonical value, and what it expects in words


def _is_int(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < 2**63


def _is_real(value: Any, low: float, *, strict: bool = False, high: float = math.inf) -> bool:
    """Whether value is a float in [low, high), or in (low, high) where strict."""
    return isinstance(value, float) and low <= value < high and not (strict and value == low)


def _is_location(value: Any) -> bool:
    return isinstance(value, str) and _LOCATION.fullmatch(value) is not None


def _is_dataset(value: Any) -> bool:
    return isinstance(value, str) and (value in DATASETS or value.endswith(".npz") or _is_location(value))


def _is_eps(value: Any) -> bool:
    if not isinstance(value, tuple) or not value or not all(_is_real(eps, 0.0) for eps in value):
        return False
    return len({format(eps, "g") for eps in value}) == len(value)  # result columns are named by six digits


def _is_attacks(value: Any) -> bool:
    return isinstance(value, tuple) and all(name in ATTACKS for name in value) and len(set(value)) == len(value)


def _choice(*names: str) -> _Rule:
    return lambda value: isinstance(value, str) and value in names, "one of " + ", ".join(names)


def _int(low: int) -> _Rule:
    return lambda value: _is_int(value, low), f"an integer >= {low}"


def _optional(rule: _Rule) -> _Rule:
    return lambda value: value is None or rule[0](value), rule[1] + ", or unset"


_POSITIVE: _Rule = (lambda value: _is_real(value, 0.0, strict=True), "a finite number > 0")
_NOT_NEGATIVE: _Rule = (lambda value: _is_real(value, 0.0), "a finite number >= 0")

_RULES: dict[str, _Rule] = {
    "dataset": (_is_dataset, f"one of {', '.join(DATASETS)}, a path to an .npz file, or module:function"),
    "model": (lambda v: v in MODELS or _is_location(v), f"one of {', '.join(MODELS)}, or module:function"),
    "width": _optional(_int(1)),
    "depth": _optional(_int(1)),
    "activation": _choice(*ACTIVATIONS),
    "normalise": _choice("none", "center", "standard"),
    "constraint": _choice(*CONSTRAINTS),
    "threshold": (lambda v: v == math.inf or _is_real(v, 0.0, strict=True), "a number > 0, or inf"),
    "seed": _int(0),
    "loss": _choice(*LOSSES),
    "loss_eps": _NOT_NEGATIVE,
    "loss_offset": _NOT_NEGATIVE,
    "temperature": _POSITIVE,
    "optimizer": _choice("sgd", "adam", "adamw"),
    "lr": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "momentum": (lambda v: _is_real(v, 0.0, high=1.0), "a number in [0, 1)"),
    "schedule": _choice("constant", "cosine", "step", "linear"),
    "warmup_epochs": _int(0),
    "epochs": _int(1),
    "batch_size": _int(1),
    "augment": _choice("none", "shift", "shift-flip"),
    "gradient_clip": _optional(_POSITIVE),
    "penalty_weight": _NOT_NEGATIVE,
    "validation_fraction": (lambda v: _is_real(v, 0.0, strict=True, high=1.0), "a number in (0, 1)"),
    "train_samples": _optional(_int(1)),
    "test_samples": _optional(_int(1)),
    "attack_samples": _optional(_int(1)),
    "norm": _choice(*NORMS),
    "eps": (_is_eps, "a list of finite numbers >= 0 that differ in their first six digits"),
    "attacks": (_is_attacks, f"a list of different names out of {', '.join(ATTACKS)}"),
    "bound": _choice(*BOUNDS),
    "checkpoint": _optional((lambda v: isinstance(v, str) and v != "", "a path")),
}
_REALS = {field.name for field in dataclasses.fields(CellConfig) if field.type in (float, float | None)}


def _canonical(key: str, value: Any) -> Any:
    """The one form in which a good value is kept, hashed and written; a bad value stays as it came."""
    if isinstance(value, list | tuple):
        items = tuple(_real(item) if key == "eps" else item for item in value)
        return tuple(sorted(items)) if items and all(isinstance(item, float) for item in items) else items
    return _real(value) if key in _REALS else value


def _real(value: Any) -> Any:
    """An integer or a ratio in text ("36/255") as a float."""
    try:
        if isinstance(value, str) and "/" in value:
            return float(Fraction(value))
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
    except (ValueError, ArithmeticError):
        return value


def _problems(values: Mapping[str, Any]) -> list[str]:
    """One clause for each bad value, or for each clash between good ones."""
    found = [
        f"{key} = {values[key]!r}: expected {text}" for key, (test, text) in _RULES.items() if not test(values[key])
    ]
    return found or list(_clashes(values))


def _clashes(values: Mapping[str, Any]) -> Iterator[str]:
    constraint, threshold, norm = values["constraint"], values["threshold"], values["norm"]
    if constraint in BASELINES and threshold != math.inf:
        yield f"threshold = {threshold!r}: the baseline {constraint} has no threshold, expected inf"
    needed = {"weight-decay": "weight_decay", "gradient-clip": "gradient_clip", "penalty": "penalty_weight"}
    if constraint in needed and not values[needed[constraint]]:
        key = needed[constraint]
        yield f"{key} = {values[key]!r}: the constraint {constraint} needs a number > 0"
    if values["warmup_epochs"] >= values["epochs"]:
        yield f"warmup_epochs = {values['warmup_epochs']}: expected fewer than epochs = {values['epochs']}"
    if unfit := [name for name in values["attacks"] if norm not in ATTACK_NORMS[name]]:
        fit = ", ".join(name for name in ATTACKS if norm in ATTACK_NORMS[name])
        yield f"attacks = {', '.join(unfit)}: not for norm {norm}, expected some of {fit}"


def _unknown(given: Iterable[Any], allowed: Sequence[str]) -> list[str]:
    """One clause that names every key not allowed, with close matches and the allowed keys."""
    unknown = [str(key) for key in given if key not in allowed]
    if not unknown:
        return []
    hints = ((key, difflib.get_close_matches(key, allowed, n=2)) for key in unknown)
    named = ", ".join(repr(key) + (f" (did you mean {' or '.join(close)}?)" if close else "") for key, close in hints)
    return [f"unknown setting {named}; allowed: {', '.join(allowed)}"]


def _plain(cell: CellConfig) -> dict[str, Any]:
    """The config as JSON values, with the format version."""
    values = dataclasses.asdict(cell)
    values["threshold"] = "inf" if math.isinf(cell.threshold) else cell.threshold
    return {"format": _FORMAT, **values}


def _toml_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
