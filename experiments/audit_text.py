"""An audit on the terminal, and the command that makes it."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .audit_claims import Claim
from .audit_execution import Execution
from .audit_rows import Audit, OperationRow, RunRow
from .store import write_atomic

__all__ = ["print_audit", "save_audit"]

_RULES = {
    "factor": "Lipschitz factor",
    "sum": "constants of the branches add",
    "concat": "constants of the branches join",
}
_PAIRS = {"l2": "sqrt(2) L", "linf": "2 L", "l1": "L"}


def save_audit(audit: Audit, path: str | Path) -> None:
    """Write the audit as JSON."""
    write_atomic(path, audit.to_json().encode() + b"\n")


def print_audit(audit: Audit, console: Console) -> None:
    """Print problems, runs, operations, the network's bracket, what holds where it runs, and mistaken claims."""
    shape = " x ".join(map(str, audit.input_shape))
    console.out(f"{audit.model}: inputs {shape}, {audit.norm} norms, runs in {audit.dtype}", highlight=False)
    if audit.problems:
        console.print(_problem_table(audit), highlight=False)
    if audit.runs:
        console.print(_run_table(audit.runs), highlight=False)
    if audit.operations:
        console.print(_operation_table(audit.operations), highlight=False)
    _print_network(audit, console)
    if audit.execution is not None:
        _print_execution(audit.execution, console)
    _print_claims(audit.claims, console)


def _table(title: str, *columns: str, numbers: int = 0) -> Table:
    """A table whose last `numbers` columns are numbers; long texts fold."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for position, column in enumerate(columns):
        if position < len(columns) - numbers:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    return table


def _problem_table(audit: Audit) -> Table:
    table = _table("can't be certified as it stands", "where", "problem", "what to do")
    for problem in audit.problems:
        table.add_row(problem.place, problem.problem, problem.remedy)
    return table


def _run_table(runs: tuple[RunRow, ...]) -> Table:
    table = _table("affine runs: norms", "layers", "operator", "method", "lower", "upper", "upper / lower", numbers=3)
    for run in runs:
        operator = f"{run.operator} {_shape(run.in_shape)} to {_shape(run.out_shape)}"
        table.add_row(
            " + ".join(run.layers), operator, run.method, f"{run.lower:.6g}", f"{run.upper:.6g}", _ratio(run.ratio)
        )
    return table


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio:.4f}" if ratio >= 1.001 else f"1 + {max(0.0, ratio - 1):.1e}"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _operation_table(operations: tuple[OperationRow, ...]) -> Table:
    """Operations of one kind, rule and factor share a row."""
    table = _table("other operations", "where", "operation", "rule", "factor", numbers=1)
    groups: dict[tuple[str, str, float | None], list[str]] = {}
    for row in operations:
        groups.setdefault((row.kind, row.rule, row.factor), []).append(row.place)
    for (kind, rule, factor), places in groups.items():
        table.add_row(", ".join(dict.fromkeys(places)), kind, _RULES[rule], "" if factor is None else f"{factor:.6g}")
    return table


def _print_network(audit: Audit, console: Console) -> None:
    network = audit.network
    if network is None:
        return
    console.out(
        f"Lipschitz constant ({audit.norm}): at least {network.lower:.6g} (Jacobian at the samples), "
        f"at most {network.upper:.6g}\n"
        f"per pair of logits: at most {network.pairwise_lowest:.6g} to {network.pairwise_highest:.6g}; "
        f"radii are at least {network.gain:.4g} times those from {_PAIRS[audit.norm]}",
        highlight=False,
    )


def _print_execution(found: Execution, console: Console) -> None:
    console.print(
        f"run in {found.arithmetic} (unit {found.unit:.3g}), at {found.samples} samples: rounding takes at most "
        f"{found.lost:.3g} off a margin (median margin {found.margin:.4g}); median radius {found.radius:.6g}, in real "
        f"arithmetic {found.real_radius:.6g}; {found.withdrawn} radii withdrawn altogether, {found.ties} samples tied. "
        f"Under bfloat16 autocast logits would move by up to {found.bfloat16:.3g}, which no certificate covers.",
        highlight=False,
    )
    console.print("assumed of the machine (certify doctor tries it):", highlight=False)
    for item in found.assumptions:
        for line in textwrap.wrap(f"{item.id}: {item.text}", console.width - 2):
            console.out(f"  {line}", highlight=False)


def _print_claims(claims: tuple[Claim, ...], console: Console) -> None:
    """What would harm in a table, the worst first; what does no harm to this model in one line."""
    harmful = sorted((claim for claim in claims if claim.verdict != "safe here"), key=lambda claim: -claim.excess)
    if harmful:
        title = "what tools with known mistakes would claim; radii: by this mistake alone"
        table = _table(title, "a tool that", "at", "verdict", "claims", "attained", "proved", numbers=3)
        for claim in harmful:
            at = claim.place + (f" and {claim.also} more" if claim.also else "")
            attained = f"{claim.attained:.6g}" if claim.attained else "-"
            proved = "none" if math.isinf(claim.proved) else f"{claim.proved:.6g}"
            table.add_row(claim.method, at, verdict(claim), f"{claim.claimed:.6g}", attained, proved)
        console.print(table, highlight=False)
    safe = [f"{claim.method} ({claim.claimed:.6g})" for claim in claims if claim.verdict == "safe here"]
    if safe:
        console.print(f"no harm to this model from a tool that {'; '.join(safe)}", highlight=False, soft_wrap=False)


def verdict(claim: Claim) -> str:
    """In words, what a claim does to radii."""
    if claim.verdict != "too small":
        return claim.verdict
    if math.isinf(claim.excess):
        return "radii infinitely too large"
    percent = 100 * (claim.excess - 1)
    return f"radii {claim.excess:.3g} times too large" if percent >= 10 else f"radii {percent:.2g} % too large"
