"""`certify attack`: attacks on one model, certifiable or not, held against its certificate where it has one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .attack_files import AttackFolder
from .checkpoints import save_checkpoint
from .config import FIELDS, CellConfig, ConfigError, usable_attacks
from .evaluation import CertificateViolationError, Evaluation, evaluate
from .stages import Opened
from .store import StoreError

__all__ = ["attack_one"]


def attack_one(
    opened: Opened,
    settings: Mapping[str, Any],
    *,
    console: Console,
    output: Path | None = None,
    batch_size: int | None = None,
) -> Evaluation:
    """Attack with `settings` on top of the model's own; print accuracies, costs, brackets, signs of masked gradients.

    A model with operations that no certificate covers is attacked all the same, with radii 0 and a line that says so.

    Args:
        opened: the model, its data and its settings.
        settings: fields of `CellConfig`; without attacks, the model's own that know the norm.
        console: is told the stages, and shown the results.
        output: folder for all that was found, see `AttackFolder`.
        batch_size: samples attacked at once; None for what fits.

    Raises:
        ConfigError: a bad setting, or an output folder that holds something else.
        CertificateViolationError: after saving the counterexample in the output folder, or in the current one.
        ValueError: a model that can't be attacked, an output folder that can't be written.
    """
    config = _with_settings(opened.config, settings)
    folder = None if output is None else AttackFolder(output)
    if folder is not None:
        folder.claim()
    try:
        found = evaluate(
            opened.model,
            config,
            opened.data,
            report=lambda stage: console.out(stage, style="dim", highlight=False),
            batch_size=batch_size,
            uncertified=True,
        )
    except CertificateViolationError as error:
        if not error.example and folder is None:
            raise
        raise CertificateViolationError(f"{error}; {_saved(error, folder)}", error.example) from error
    _show(opened, config, found, console)
    if folder is not None:
        folder.write(opened.name, config, found)
        console.out(f"results: {folder.path}", highlight=False)
    return found


def _saved(error: CertificateViolationError, folder: AttackFolder | None) -> str:
    """Where the example of a broken certificate, or the finding alone, lies now."""
    try:
        if folder is not None:
            return f"saved in {folder.refute(str(error), error.example)}"
        save_checkpoint("counterexample.safetensors", error.example)
    except StoreError as failure:  # the broken certificate is what matters
        return f"the example could not be saved: {failure}"
    return "saved in counterexample.safetensors"


def _with_settings(config: CellConfig, settings: Mapping[str, Any]) -> CellConfig:
    """The model's config with other attack settings; a list of one seed stands for itself.

    Without a setting for the attacks, the model's own that know the norm.
    """
    seeds = settings.get("seed", [config.seed])
    if len(seeds) != 1:
        raise ConfigError(f"seed: expected one, got {len(seeds)}")
    values = {**{field: getattr(config, field) for field in FIELDS}, **settings, "seed": seeds[0]}
    if not settings.get("attacks"):
        values["attacks"] = usable_attacks(config.attacks, values["norm"])
    return CellConfig(**values)


def _show(opened: Opened, config: CellConfig, found: Evaluation, console: Console) -> None:
    def say(line: str) -> None:
        console.out(line, highlight=False)

    results = found.results
    if found.no_certificate is not None:
        say(f"no certificate: {found.no_certificate}")
    say(f"{opened.name}: accuracy on {results['attacked_count']} attacked samples, %")
    console.print(_accuracies(config, found))
    if found.attempts:
        say("what each attack did")
        console.print(_attempts(found), crop=False)
    for line in (*_spared(config, found), *_brackets(config, found), *found.notes, *_doubts(found)):
        say(line)


def _accuracies(config: CellConfig, found: Evaluation) -> Table:
    """A row for the certified accuracy, one for each attack, one for the worst case; a column an eps."""
    table = Table()
    table.add_column(f"{config.norm} eps", no_wrap=True)
    for eps in config.eps:
        table.add_column(f"{eps:g}", justify="right")
    after = "after " if config.attack_schedule == "cascade" or config.audit else ""
    names = dict.fromkeys(attempt.attack for attempt in found.attempts)
    rows = {"certified": "certified_accuracy_attacked", **{f"{after}{name}": f"accuracy_{name}" for name in names}}
    for title, key in {**rows, "worst case": "worst_case_accuracy"}.items():
        table.add_row(title, *(f"{100 * found.results[f'{key}_eps_{eps:g}']:.1f}" for eps in config.eps))
    return table


def _attempts(found: Evaluation) -> Table:
    """A row for each attack at each eps."""
    table = Table()
    table.add_column("attack", no_wrap=True)
    for column in ("eps", "attacked", "broken", "forwards", "gradients", "seconds"):
        table.add_column(column, justify="right")
    if any(attempt.note for attempt in found.attempts):
        table.add_column("ended by")
    for one in found.attempts:
        eps = "-" if one.eps is None else f"{one.eps:g}"
        counts = (str(count) for count in (one.attacked, one.broken, one.forwards, one.gradients))
        row = [one.attack, eps, *counts, f"{one.seconds:.1f}", one.note]
        table.add_row(*row[: len(table.columns)])
    return table


def _spared(config: CellConfig, found: Evaluation) -> list[str]:
    """At which eps how many samples were not attacked, since they are certified there."""
    counts = {eps: found.results.get(f"certified_skipped_eps_{eps:g}", 0) for eps in config.eps}
    told = ", ".join(f"{count} at eps {eps:g}" for eps, count in counts.items() if count)
    lines = [f"certified, and so spared by attacks with an eps: {told}"] if told else []
    rows = found.samples[found.samples["attacked"] & (found.samples["label"] == found.samples["prediction"])]
    tried = rows[[name for name in rows if str(name).startswith("attempted_")]].any(axis=1)
    if lines and found.results["attack_complete"] and (left := int((~tried).sum())):
        lines.append(f"{left} of them no attack has tried at all: fmn or --audit looks for points within their radii")
    return lines


def _brackets(config: CellConfig, found: Evaluation) -> list[str]:
    """Means and medians of the radii and of the distances that were found, and how near these are to each other."""
    results, rows = found.results, found.samples
    rows = rows[rows["attacked"]]
    if results["mean_distance"] is None:
        return ["no adversarial example found"] if found.attempts else []
    mean, median = results["tightness"], results["tightness_median"]
    held = rows[(rows["distance"] < float("inf")) & (rows[f"radius_{config.norm}"] < float("inf"))]
    right = held[held["label"] == held["prediction"]]
    radius, distance = held[f"radius_{config.norm}"].mean(), held["distance"].mean()
    means = f"certified radius {radius:.4g}, smallest distance found {distance:.4g}, tightness {_number(mean)}"
    lines = [f"mean of the {len(held)} samples with an adversarial example, 0 where misclassified: {means}"]
    if len(right):
        radius, distance = right[f"radius_{config.norm}"].median(), right["distance"].median()
        lines.append(
            f"median of the {len(right)} correctly classified samples with an adversarial example: certified radius "
            f"{radius:.4g} <= {config.norm} robustness <= {distance:.4g}, tightness {_number(median)}"
        )
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _doubts(found: Evaluation) -> list[str]:
    """Signs that the attacks found too little."""
    lines = [] if found.results["attack_complete"] else ["attacks incomplete: a budget ended them"]
    flags = () if found.diagnosis is None else found.diagnosis.flags
    return [*lines, *(f"warning, {flag.name}: {flag.text}" for flag in flags)]
