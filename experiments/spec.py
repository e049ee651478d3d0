"""A study: the cells of one grid or several, as a TOML file describes them, and how they are to be run.

Every list of values spans an axis of a grid. The file is checked as a whole: all that is wrong is named in one line.
"""

import dataclasses
import itertools
import json
import math
import re
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from .config import (
    FIELDS,
    NEEDED,
    PATH,
    RULES,
    CellConfig,
    ConfigError,
    Rule,
    at_least,
    canonical,
    choice,
    clashes,
    different,
    optional,
    unknown_names,
    usable_attacks,
)
from .presets import BASELINE_SETTINGS, DEFAULT_THRESHOLDS, DEFAULTS, PRESETS

PLURALS = {  # second names of settings in a study
    "dataset": "datasets",
    "model": "models",
    "constraint": "constraints",
    "threshold": "thresholds",
    "seed": "seeds",
    "preset": "presets",
}
LISTS = ("eps", "attacks")  # settings whose one value is a list
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")

_Axes: TypeAlias = Mapping[str, tuple[Any, ...]]  # values of each field that is set


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSpec:
    """A study: the cells of one grid or several, and how they are to be run.

    A grid is every combination of the values of its fields. A field that it leaves out comes from the cell's data
    set (`DEFAULTS`), then from `CellConfig`; thresholds left out are `DEFAULT_THRESHOLDS`, attacks left out those of
    the defaults that know the cell's norm. The baselines ("none", "weight-decay", "gradient-clip") have no threshold:
    each is a single cell, at threshold inf, where other constraints have one a threshold; it has its own weight decay
    or gradient clip where none was set.

    Attributes:
        parts: the grids; each a mapping from fields of `CellConfig` to a value or a list of values. For eps and
            attacks, whose one value is a list, that is a list of lists. "unset" stands for None, "inf" for an
            infinite threshold.
        execution: how the cells are run; keys and values as in `EXECUTION`.
        slurm: options of the cluster's jobs, not checked here.

    Raises:
        ConfigError: names every bad value and its part in one line.
    """

    parts: Sequence[Mapping[str, Any]] = ({},)
    execution: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    slurm: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [f"part {number}" if len(self.parts) > 1 else "" for number in range(1, len(self.parts) + 1)]
        tables = [_read_table(part, name, FIELDS) for part, name in zip(self.parts, names, strict=True)]
        problems = [] if tables else ["parts = []: expected at least one"]
        problems += [*itertools.chain(*(table.problems for table in tables)), *_execution_problems(self.execution)]
        problems += _no_table(self.slurm, "slurm")
        _raise(problems or (clause for table in tables for clause in _grid_clashes(table.axes, table.place)))
        object.__setattr__(self, "parts", tuple(table.axes for table in tables))
        object.__setattr__(self, "execution", _without_none(self.execution))
        object.__setattr__(self, "slurm", _without_none(self.slurm))

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> "RunSpec":
        """Build from the content of a spec file.

        Args:
            mapping: fields of `CellConfig`, or their plurals (`PLURALS`), each with a value or a list of values; and

                preset: name of settings that go under those beside it; of several names, a grid for each. Known are
                    `PRESETS` and the tables that the mapping itself holds under this key (or presets, its plural).
                part: tables of the same keys, each a grid of its own on top of what is given outside; its settings,
                    and then those of its presets, win over the outer ones.
                execution, slurm: as in the class.
            overrides: settings that replace those of the mapping everywhere in it; the settings of a preset named
                here win over the mapping, too.

        Raises:
            ConfigError: names, in one line, every unknown key or preset with close matches and all that are allowed,
                and every bad value, each with its place.
        """
        flags = _read_table(overrides or {}, "")
        _raise(flags.problems)
        study = _read_study(mapping, {name for key in flags.axes for name in _names(key)})
        presets = {**{name: _read_table(table, f"preset {name}") for name, table in PRESETS.items()}, **study.presets}
        _raise([*study.problems, *_preset_problems((flags, study.top, *study.parts), presets)])
        grids = [
            (part.place, {**outer, **inner, **last})
            for part in study.parts
            for outer in _layers(study.top, presets)
            for inner in _layers(part, presets)
            for last in _layers(flags, presets)
        ]
        _raise(clause for place, axes in grids for clause in _grid_clashes(axes, place))
        tables = {key: mapping[key] for key in _TABLES if key in mapping}
        return cls(parts=[axes for _, axes in grids], **tables)

    @classmethod
    def from_toml(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> "RunSpec":
        """Read a TOML file of the keys that `from_mapping` takes; `overrides` win over the file.

        Raises:
            ConfigError: the file cannot be read, is not TOML, or holds a bad key or value; names the file.
        """
        _raise(_read_table(overrides or {}, "").problems)  # not the file's fault
        try:
            return cls.from_mapping(_parsed(Path(path).read_text(encoding="utf-8")), overrides)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: {error}") from error

    def to_toml(self) -> str:
        """Text that `from_toml` reads back as an equal study; presets are written out."""
        several = len(self.parts) > 1
        blocks = [_toml_rows({} if several else _written(self.parts[0]))]
        blocks += [f"[{key}]\n{_toml_rows(getattr(self, key))}" for key in _TABLES if getattr(self, key)]
        blocks += [f"[[part]]\n{_toml_rows(_written(part))}" for part in self.parts if several]
        return "\n".join(block for block in blocks if block)

    def cells(self) -> tuple[CellConfig, ...]:
        """All cells without repeats, part by part; seeds vary fastest, then thresholds, then constraints.

        The other fields vary slower, the first of `FIELDS` slowest; the values of each come as listed.
        """
        values = itertools.chain.from_iterable(map(_grid, self.parts))
        return tuple(dict.fromkeys(map(_known_good, values)))


# Grids

_DEFAULT_VALUES: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(CellConfig)}
_INNER = ("constraint", "threshold", "seed")
_CLASHING = ("dataset", "constraint", *NEEDED.values(), "warmup_epochs", "epochs", "norm", "attacks")


def _grid(axes: _Axes) -> Iterator[dict[str, Any]]:
    """Complete values of each cell of one grid, in the order of `RunSpec.cells`."""
    outer = [key for key in FIELDS if key in axes and key not in _INNER]
    for combination in itertools.product(*(axes[key] for key in outer)):
        given = dict(zip(outer, combination, strict=True))
        defaults = {**_DEFAULT_VALUES, **DEFAULTS.get(given.get("dataset", _DEFAULT_VALUES["dataset"]), {})}
        if "attacks" not in given:
            norm = given.get("norm", defaults["norm"])
            defaults["attacks"] = usable_attacks(defaults["attacks"], norm)
        for constraint in axes.get("constraint", (defaults["constraint"],)):
            baseline = BASELINE_SETTINGS.get(constraint)
            shared = {**defaults, **(baseline or {}), **given, "constraint": constraint}
            thresholds = axes.get("threshold", DEFAULT_THRESHOLDS) if baseline is None else (math.inf,)
            for threshold, seed in itertools.product(thresholds, axes.get("seed", (defaults["seed"],))):
                yield {**shared, "threshold": threshold, "seed": seed}


def _grid_clashes(axes: _Axes, place: str) -> Iterator[str]:
    """One clause for each clash between good values, over the combinations of those that can clash."""
    few = {key: axes[key] for key in _CLASHING if key in axes}
    for values in _grid({**few, "threshold": (1.0,), "seed": (0,)}):
        yield from (_at(place) + clause for clause in clashes(values))


def _known_good(values: Mapping[str, Any]) -> CellConfig:
    """A cell of values that were checked axis by axis, since checking every cell anew takes ten times as long."""
    cell = object.__new__(CellConfig)
    cell.__dict__.update(values)
    return cell


# Spec files

_SETTINGS = (*FIELDS, *PLURALS.values(), "preset")  # the keys of every table of settings
_TABLES = ("execution", "slurm")
_NAME: Rule = (lambda value: isinstance(value, str), "a name or a list of names")
_OPTIONAL = {field.name for field in dataclasses.fields(CellConfig) if field.default is None}
EXECUTION: dict[str, Rule] = {
    "executor": choice("inline", "local", "slurm"),
    "jobs": optional(at_least(1)),
    "device": (lambda v: isinstance(v, str) and _DEVICE.fullmatch(v) is not None, "cpu, cuda or cuda:N"),
    "threads": at_least(1),
    "gpus_per_cell": at_least(1),
    "cells_per_gpu": at_least(1),
    "track": different("tensorboard", "mlflow"),
    "data_root": optional(PATH),
}


@dataclasses.dataclass(frozen=True)
class _Table:
    """One table of settings: its place in the file, the fields set, the presets under them, what is wrong in it."""

    place: str
    axes: _Axes
    presets: tuple[str, ...]
    problems: Sequence[str]


@dataclasses.dataclass(frozen=True)
class _Study:
    """The tables of settings in a spec file, and what is wrong in the file."""

    top: _Table
    parts: Sequence[_Table]
    presets: Mapping[str, _Table]  # those of the file
    problems: Sequence[str]


def _read_study(mapping: Mapping[str, Any], replaced: Collection[str]) -> _Study:
    """Everything of a spec file but the keys that are replaced."""
    defining = [key for key in ("preset", "presets") if isinstance(mapping.get(key), Mapping)]
    defined = {str(name): table for key in defining for name, table in mapping[key].items()}
    parts = mapping.get("part", [{}])
    are_parts = isinstance(parts, list | tuple) and len(parts) > 0
    top = {key: value for key, value in mapping.items() if key not in ("part", *_TABLES, *defining)}
    tables = [
        _read_table(_without(top, replaced), "", (*_SETTINGS, "part", *_TABLES)),
        *(_read_table(_without(table, replaced), f"preset {name}") for name, table in defined.items()),
        *(
            _read_table(_without(part, replaced), f"part {number}" if "part" in mapping else "")
            for number, part in enumerate(parts if are_parts else (), 1)
        ),
    ]
    problems = [clause for table in tables for clause in table.problems]
    if len(defining) == 2:
        problems.append("define presets under preset or presets, not both")
    problems += [f"preset {name}: a built-in preset has this name" for name in defined if name in PRESETS]
    if not are_parts:
        problems.append(f"part = {parts!r}: expected tables, each under [[part]]")
    problems += _execution_problems(mapping.get("execution", {})) + _no_table(mapping.get("slurm", {}), "slurm")
    own = dict(zip(defined, tables[1:], strict=False))
    return _Study(tables[0], tables[1 + len(defined) :], own, problems)


def _without(given: Any, replaced: Collection[str]) -> Any:
    if not isinstance(given, Mapping):
        return given
    return {key: value for key, value in given.items() if key not in replaced}


def _read_table(given: Any, place: str, allowed: Collection[str] = _SETTINGS) -> _Table:
    """A table of settings, every value in its one form."""
    if problems := _no_table(given, place):
        return _Table(place, {}, (), problems)
    problems = unknown_names(given, allowed)
    axes: dict[str, tuple[Any, ...]] = {}
    for key in (*FIELDS, "preset"):
        names = [name for name in _names(key) if name in given]
        if len(names) == 2:
            problems.append(f"set {names[0]} or {names[1]}, not both")
        elif names:
            axes[key], found = _read_axis(key, names[0], given[names[0]])
            problems += found
    return _Table(place, axes, axes.pop("preset", ()), [_at(place) + clause for clause in problems])


def _names(key: str) -> tuple[str, ...]:
    return (key, PLURALS[key]) if key in PLURALS else (key,)


def _read_axis(key: str, name: str, given: Any) -> tuple[tuple[Any, ...], list[str]]:
    """The values that a setting spans, without repeats, and what is wrong with them.

    A list spans its values; for eps and attacks, whose one value is a list, a list of lists does.
    """
    spans = isinstance(given, list | tuple)
    if spans and key in LISTS:
        spans = any(isinstance(item, list | tuple) for item in given)
    values = tuple(canonical(key, _spoken(key, item)) for item in (given if spans else (given,)))
    if not values:
        return values, [f"{name} = []: expected a list with at least one value"]
    test, text = RULES.get(key, _NAME)
    if bad := [f"{key} = {value!r}: expected {text}" for value in values if not test(value)]:
        return (), bad
    return tuple(dict.fromkeys(values)), []


def _spoken(key: str, value: Any) -> Any:
    """What a value in words stands for: TOML has no null, and JSON no infinity."""
    if value == "unset" and key in _OPTIONAL:
        return None
    return math.inf if value == "inf" and key == "threshold" else value


def _layers(table: _Table, presets: Mapping[str, _Table]) -> list[_Axes]:
    """The grids of a table: what it sets, on top of each of its presets with what these build on."""
    if not table.presets:
        return [table.axes]
    return [{**below, **table.axes} for name in table.presets for below in _layers(presets[name], presets)]


def _preset_problems(tables: Sequence[_Table], presets: Mapping[str, _Table]) -> list[str]:
    """Clauses for the names of presets that nobody defined, or for presets that build on themselves."""
    unknown = [
        _at(table.place) + clause
        for table in (*tables, *presets.values())
        for clause in unknown_names(table.presets, presets, "preset")
    ]
    circles = [] if unknown else [circle for name in presets if (circle := _circle(name, presets))]
    return unknown or [f"presets build on one another in a circle: {' -> '.join(names)}" for names in circles[:1]]


def _circle(name: str, presets: Mapping[str, _Table], above: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The names on the way from a preset to itself; none where there is no such way."""
    if name in above:
        return (*above[above.index(name) :], name)
    ways = (_circle(below, presets, (*above, name)) for below in presets[name].presets)
    return next(filter(None, ways), ())


def _execution_problems(given: Any) -> list[str]:
    if problems := _no_table(given, "execution"):
        return problems
    problems = unknown_names(given, EXECUTION)
    for key, (test, text) in EXECUTION.items():
        if key in given and not test(canonical(key, given[key])):
            problems.append(f"{key} = {given[key]!r}: expected {text}")
    return [f"execution: {clause}" for clause in problems]


def _no_table(given: Any, place: str) -> list[str]:
    return [] if isinstance(given, Mapping) else [f"{place or 'settings'} = {given!r}: expected a table"]


def _at(place: str) -> str:
    return f"{place}: " if place else ""


def _raise(problems: Iterable[str]) -> None:
    if clauses := list(dict.fromkeys(problems)):
        raise ConfigError("; ".join(clauses))


# Text


def _parsed(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        if "[preset." not in text or "overwrite" not in str(error):
            raise
        raise ConfigError(f"{error}: where preset = ... stands at the top, define presets as [presets.NAME]") from error


def _without_none(value: Any) -> Any:
    """A table as TOML can hold it: entries that are None left out, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list | tuple) else value


def _written(axes: _Axes) -> dict[str, Any]:
    """A grid as a table of settings: an axis with one value is that value."""
    spoken = {key: ["unset" if value is None else value for value in values] for key, values in axes.items()}
    return {key: values[0] if len(values) == 1 else values for key, values in spoken.items()}


def _toml_rows(table: Mapping[str, Any]) -> str:
    return "".join(f"{_toml_key(key)} = {_toml_value(value)}\n" for key, value in table.items())


def _toml_key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(key)} = {_toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else str(value)
