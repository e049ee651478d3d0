"""What one run is: every setting that changes its result, checked when it is built.

`CellConfig` is one training with its evaluation; its hash names the run folder. Where the data lie, the device, the
output folder and the number of jobs are not part of a config, since they must not change its id.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
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
    "fgsm": NORMS,
    "pgd": NORMS,
    "apgd-ce": ("l2", "linf"),
    "apgd-dlr": ("l2", "linf"),
    "apgd-t": ("l2", "linf"),
    "fab": NORMS,
    "square": ("l2", "linf"),
    "autoattack": ("l2", "linf"),
    "eot-pgd": ("linf",),
    "spsa": ("linf",),
    "deepfool": NORMS,
    "cw": ("l2",),
    "ddn": ("l2",),
    "fmn": NORMS,
    "rounding-search": NORMS,
}
ATTACKS = tuple(ATTACK_NORMS)
SCHEDULES = ("cascade", "each")
_SEARCHES_IN_L2 = ("ddn", "cw")
_USUAL = ("fgsm", "pgd", "fmn")  # attacks in a norm that none of the chosen ones knows
BOUNDS = ("product", "closed-form", "lipsdp", "lipsdp-layer", "lipsdp-first-order", "local", "auto")
ARITHMETICS = ("model", "real", "float64", "float32", "float16", "bfloat16")

_FORMAT = 2  # raise it when a field changes meaning: ids then change and no old run is taken for a new one
_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([smh]?)")
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_LOCATION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
NEEDED = {"weight-decay": "weight_decay", "gradient-clip": "gradient_clip", "penalty": "penalty_weight"}


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
    attack_schedule: str = "cascade"  # each attack on what the cheaper ones left; "each" on all samples
    audit: bool = False  # certified samples are attacked too, and harder
    integer_pixels: bool = False  # only points k/255 count
    max_gradients: int | None = None  # of the attacks, a mean over the correctly classified samples; None = no limit
    max_seconds: float | None = None  # of the attacks; None = no limit
    bound: str = "product"
    bound_budget: float = 60.0  # seconds that a bound may take beyond the product, and again local radii; in each norm
    arithmetic: str = "model"  # that the certified network runs in
    checkpoint: str | None = None  # weights to start from (.safetensors or a torch file)

    def __post_init__(self) -> None:
        values = {key: canonical(key, getattr(self, key)) for key in FIELDS}
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
        problems = unknown_names(values, FIELDS)
        problems += [f"{key} is missing" for key in FIELDS if key not in values and key not in ADDED]
        if problems:
            raise ConfigError("; ".join(problems))
        if values["threshold"] == "inf":
            values["threshold"] = math.inf
        return cls(**{**ADDED, **values})

    def to_json(self) -> str:
        """Text that `from_json` turns into an equal config; an infinite threshold is the string "inf"."""
        return json.dumps(_plain(self), indent=2, allow_nan=False) + "\n"


def usable_attacks(attacks: Sequence[str], norm: str) -> tuple[str, ...]:
    """Those of the attacks that know the norm, with fmn for a search of the smallest perturbation that does not.

    Such a search holds every radius against a distance, also where attacks with a ball spare the sample. Where no
    attack is left, the usual ones.
    """
    named = ("fmn" if name in _SEARCHES_IN_L2 and norm != "l2" else name for name in attacks)
    return tuple(dict.fromkeys(name for name in named if norm in ATTACK_NORMS[name])) or _USUAL


FIELDS = tuple(field.name for field in dataclasses.fields(CellConfig))
# Fields of later versions, and what a config without them means; at that value they are neither written nor hashed, so
# that ids stay what they were.
ADDED: dict[str, Any] = {
    "bound_budget": 60.0,
    "attack_schedule": "each",
    "audit": False,
    "integer_pixels": False,
    "max_gradients": None,
    "max_seconds": None,
}


_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


def config_id(cell: CellConfig) -> str:
    """First 12 hex digits of the SHA-256 of the config's canonical JSON: equal configs, equal ids, anywhere."""
    return hashlib.sha256(_encode(_plain(cell)).encode()).hexdigest()[:12]


Rule: TypeAlias = tuple[Callable[[Any], bool], str]  # a test of a canonical value, and what it expects in words


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


def choice(*names: str) -> Rule:
    """One of some names."""
    return lambda value: isinstance(value, str) and value in names, "one of " + ", ".join(names)


def at_least(low: int) -> Rule:
    """An integer from `low` up."""
    return lambda value: _is_int(value, low), f"an integer >= {low}"


def different(*names: str) -> Rule:
    """Some of the names, each once."""

    def test(value: Any) -> bool:
        return isinstance(value, tuple) and all(name in names for name in value) and len(set(value)) == len(value)

    return test, f"a list of different names out of {', '.join(names)}"


def optional(rule: Rule) -> Rule:
    """What `rule` takes, or None."""
    return lambda value: value is None or rule[0](value), rule[1] + ", or unset"


_POSITIVE: Rule = (lambda value: _is_real(value, 0.0, strict=True), "a finite number > 0")
_NOT_NEGATIVE: Rule = (lambda value: _is_real(value, 0.0), "a finite number >= 0")
_DURATION_RULE: Rule = (lambda value: _is_real(value, 0.0, strict=True), "seconds > 0, such as 90, 90s or 2m")
_TRUTH: Rule = (lambda value: isinstance(value, bool), "true or false")
PATH: Rule = (lambda value: isinstance(value, str) and value != "", "a path")

RULES: dict[str, Rule] = {
    "dataset": (_is_dataset, f"one of {', '.join(DATASETS)}, a path to an .npz file, or module:function"),
    "model": (lambda v: v in MODELS or _is_location(v), f"one of {', '.join(MODELS)}, or module:function"),
    "width": optional(at_least(1)),
    "depth": optional(at_least(1)),
    "activation": choice(*ACTIVATIONS),
    "normalise": choice("none", "center", "standard"),
    "constraint": choice(*CONSTRAINTS),
    "threshold": (lambda v: v == math.inf or _is_real(v, 0.0, strict=True), "a number > 0, or inf"),
    "seed": at_least(0),
    "loss": choice(*LOSSES),
    "loss_eps": _NOT_NEGATIVE,
    "loss_offset": _NOT_NEGATIVE,
    "temperature": _POSITIVE,
    "optimizer": choice("sgd", "adam", "adamw"),
    "lr": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "momentum": (lambda v: _is_real(v, 0.0, high=1.0), "a number in [0, 1)"),
    "schedule": choice("constant", "cosine", "step", "linear"),
    "warmup_epochs": at_least(0),
    "epochs": at_least(1),
    "batch_size": at_least(1),
    "augment": choice("none", "shift", "shift-flip"),
    "gradient_clip": optional(_POSITIVE),
    "penalty_weight": _NOT_NEGATIVE,
    "validation_fraction": (lambda v: _is_real(v, 0.0, strict=True, high=1.0), "a number in (0, 1)"),
    "train_samples": optional(at_least(1)),
    "test_samples": optional(at_least(1)),
    "attack_samples": optional(at_least(1)),
    "norm": choice(*NORMS),
    "eps": (_is_eps, "a list of finite numbers >= 0 that differ in their first six digits"),
    "attacks": different(*ATTACKS),
    "attack_schedule": choice(*SCHEDULES),
    "audit": _TRUTH,
    "integer_pixels": _TRUTH,
    "max_gradients": optional(at_least(1)),
    "max_seconds": optional(_DURATION_RULE),
    "bound": choice(*BOUNDS),
    "bound_budget": _DURATION_RULE,
    "arithmetic": choice(*ARITHMETICS),
    "checkpoint": optional(PATH),
}
DURATIONS = ("bound_budget", "max_seconds")  # settings that may be given as text with a unit
_REALS = {field.name for field in dataclasses.fields(CellConfig) if field.type in (float, float | None)}


def canonical(key: str, value: Any) -> Any:
    """The one form in which a good value is kept, hashed and written; a bad value stays as it came."""
    if isinstance(value, list | tuple):
        items = tuple(_real(item) if key == "eps" else item for item in value)
        return tuple(sorted(items)) if items and all(isinstance(item, float) for item in items) else items
    if key in DURATIONS:
        return _seconds(value)
    return _real(value) if key in _REALS else value


def _seconds(value: Any) -> Any:
    """A duration in text ("90", "90s", "2m", "1h") as seconds."""
    found = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    return _real(value) if found is None else float(found[1]) * _UNITS[found[2]]


def _real(value: Any) -> Any:
    """An integer or a ratio in text ("36/255") as a float; never -0.0, whose JSON is not that of the equal 0.0."""
    try:
        if isinstance(value, str) and "/" in value:
            above, _, below = value.partition("/")
            return float(Fraction(above) / Fraction(below))
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) + 0.0 if is_number else value
    except (ValueError, ArithmeticError):
        return value


def _problems(values: Mapping[str, Any]) -> list[str]:
    """One clause for each bad value, or for each clash between good ones."""
    found = [
        f"{key} = {values[key]!r}: expected {text}" for key, (test, text) in RULES.items() if not test(values[key])
    ]
    return found or list(clashes(values))


def clashes(values: Mapping[str, Any]) -> Iterator[str]:
    """One clause for each clash between values that are good by themselves."""
    constraint, threshold, norm = values["constraint"], values["threshold"], values["norm"]
    if constraint in BASELINES and threshold != math.inf:
        yield f"threshold = {threshold!r}: the baseline {constraint} has no threshold, expected inf"
    if constraint in NEEDED and not values[NEEDED[constraint]]:
        key = NEEDED[constraint]
        yield f"{key} = {values[key]!r}: the constraint {constraint} needs a number > 0"
    if values["warmup_epochs"] >= values["epochs"]:
        yield f"warmup_epochs = {values['warmup_epochs']}: expected fewer than epochs = {values['epochs']}"
    if unfit := [name for name in values["attacks"] if norm not in ATTACK_NORMS[name]]:
        fit = ", ".join(name for name in ATTACKS if norm in ATTACK_NORMS[name])
        yield f"attacks = {', '.join(unfit)}: not for norm {norm}, expected some of {fit}"


def unknown_names(given: Iterable[Any], allowed: Collection[str], kind: str = "setting") -> list[str]:
    """One clause that names every name not allowed, with close matches and the allowed ones."""
    unknown = [str(key) for key in given if key not in allowed]
    if not unknown:
        return []
    hints = ((key, difflib.get_close_matches(key, allowed, n=2)) for key in unknown)
    named = ", ".join(repr(key) + (f" (did you mean {' or '.join(close)}?)" if close else "") for key, close in hints)
    return [f"unknown {kind} {named}; allowed: {', '.join(allowed)}"]


def _plain(cell: CellConfig) -> dict[str, Any]:
    """The config as JSON values, with the format version."""
    values = {key: value for key, value in vars(cell).items() if key not in ADDED or value != ADDED[key]}
    return {"format": _FORMAT, **values, "threshold": "inf" if cell.threshold == math.inf else cell.threshold}
