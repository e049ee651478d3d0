"""The `certify` command: each sub-command reads its flags and makes one call into the package.

Heavy imports stay inside the commands, so that `certify --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from . import __version__
from .experiments.config import CellConfig, ConfigError
from .experiments.flags import HELP, SWITCHES, default_text, parse_settings
from .experiments.spec import PLURALS, RunSpec

if TYPE_CHECKING:
    from rich.console import Console

Command = TypeVar("Command", bound=Callable[..., Any])
_OUTPUT = click.Path(file_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_PIPE_WIDTH = 100  # characters, where the output is no terminal


class _Group(click.Group):
    """Turns an error into one line and an exit code: 1 a failure, 2 bad input, 130 an interruption."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        sys.path.insert(0, "")  # module:function may name a file of the current folder, as with `python -m`
        try:
            super().main(*args, **kwargs)
        except click.exceptions.Exit as stop:
            sys.exit(stop.exit_code)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            _fail("interrupted; what is finished is kept, and the same command goes on from there", 130)
        except (ValueError, RuntimeError, OSError, ArithmeticError) as error:
            _fail(_one_line(error), 2 if isinstance(error, ConfigError) else 1)
        sys.exit(0)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"certify: error: {message}", err=True)
    sys.exit(code)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _console() -> Console:
    from rich.console import Console

    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=_PIPE_WIDTH if piped else None)


def _settings(command: Command) -> Command:
    """One flag for each field of `CellConfig`, and one for presets; axes may be named in the plural too."""
    for key in reversed(HELP):
        name = key.replace("_", "-")
        names = [f"--{name}", *([f"--{PLURALS[key]}"] if key in PLURALS else [])]
        if key in SWITCHES:
            names = [f"--{name}/--no-{name}"]
        command = click.option(*names, key, default=None, help=f"{HELP[key]} [{default_text(key)}]")(command)
    return command


def _machine(command: Command) -> Command:
    for option in (
        click.option("--device", default=None, help="cpu, cuda or cuda:N [cpu]"),
        click.option("--data-root", type=_OUTPUT, default=None, help="folder of the public data sets [SPECCERT_DATA]"),
    ):
        command = option(command)
    return command


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _spec(path: Path | None, flags: dict[str, str | bool | None]) -> RunSpec:
    """The grid of a spec file, or of the data set's defaults, with the given flags on top."""
    settings = parse_settings(flags)
    if path is None:
        return RunSpec.from_mapping(settings)
    return RunSpec.from_toml(path, overrides=settings)


def _checked_execution(
    grid: RunSpec,
    executor: str | None,
    jobs: int | None,
    threads: int | None,
    gpus_per_cell: int | None,
    cells_per_gpu: int | None,
    slurm: tuple[str, ...],
) -> dict[str, Any]:
    """The options of the Slurm jobs; all that says how cells run is checked, whether it is used or not."""
    from .experiments.slurm_options import SlurmOptions, parse_options

    given = {"executor": executor, "jobs": jobs, "threads": threads}
    given |= {"gpus_per_cell": gpus_per_cell, "cells_per_gpu": cells_per_gpu}
    RunSpec(execution={**grid.execution, **{key: value for key, value in given.items() if value is not None}})
    options = parse_options(slurm)
    SlurmOptions.from_mapping({**grid.slurm, **options})
    return options


@click.group(
    cls=_Group,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="certify")
@click.pass_context
def main(context: click.Context) -> None:
    """Certify how robust a neural network is, and attack it to check.

    \b
    certify run                            digits, several thresholds: a minute
    certify run spec.toml -o runs/mnist    the same of a spec file
    certify status runs/mnist              what its cells do
    certify report runs/mnist              a page with everything
    certify doctor                         what this machine can do
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@main.command()
@click.argument("spec", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", type=_OUTPUT, default=Path("runs"), show_default=True, help="folder of run folders")
@click.option("--dry-run", is_flag=True, help="only list the cells, their state, and what is left to compute")
@click.option("--retry-failed", is_flag=True, help="run the cells again that failed before")
@click.option("--executor", default=None, help="inline (this process), local (several) or slurm (jobs) [local]")
@click.option("--jobs", type=int, default=None, help="cells at once, local executor [one a core, or one a GPU]")
@click.option("--threads", type=int, default=None, help="torch threads of a cell; the last bits depend on them [1]")
@click.option(
    "--gpus-per-cell", type=int, default=None, help="GPUs (on a CPU: processes) that train a cell together [1]"
)
@click.option("--cells-per-gpu", type=int, default=None, help="small cells side by side on one GPU [1]")
@click.option("--track", default=None, help="log each training to tensorboard, mlflow, or both")
@click.option("--slurm", multiple=True, metavar="KEY=VALUE", help="option of the Slurm jobs, e.g. partition=gpu; "
              "may be repeated; docs/cluster.md has all")  # fmt: skip
@click.option("--no-wait", is_flag=True, help="submit the Slurm jobs and leave them to themselves")
@click.option(
    "--certificate", default=None, metavar="NAME.json", help="also write a certificate into each cell's folder"
)
@_settings
@_machine
def run(
    spec: Path | None,
    output: Path,
    dry_run: bool,
    retry_failed: bool,
    executor: str | None,
    jobs: int | None,
    threads: int | None,
    gpus_per_cell: int | None,
    cells_per_gpu: int | None,
    track: str | None,
    slurm: tuple[str, ...],
    no_wait: bool,
    certificate: str | None,
    device: str | None,
    data_root: Path | None,
    **flags: str | bool | None,
) -> None:
    """Train, bound, certify and attack every threshold; print the robustness table.

    SPEC is a TOML file of the settings below (dashes as underscores). A flag replaces its setting everywhere in the
    file; the settings of a --preset do so too, under the other flags. Values joined by commas span a grid, but for
    --eps, --attacks and --checkpoint. Finished cells are kept: the same command goes on where it was interrupted.

    \b
    certify run
    certify run --dataset mnist --data-root data --thresholds 0.5,1,2,inf --seeds 0,1,2 --jobs 2
    certify run examples/study.toml -o runs/study --dry-run
    certify run examples/study.toml -o runs/study --executor slurm --slurm partition=gpu
    """
    grid = _spec(spec, flags)
    console = _console()
    options = _checked_execution(grid, executor, jobs, threads, gpus_per_cell, cells_per_gpu, slurm)
    if certificate is not None:
        from .experiments.certify_stage import check_name

        check_name(certificate, wait=not no_wait)
    if dry_run:
        from .experiments.status import print_dry_run

        print_dry_run(grid, output, console)
        return
    from .experiments.certify_stage import certifying
    from .experiments.console import LiveRun
    from .experiments.sweep import run as run_grid
    from .experiments.table_writers import print_table

    with certifying(grid, output, certificate, data_root=data_root, console=console), LiveRun(console) as watcher:
        table = run_grid(
            grid,
            output,
            executor=executor or grid.execution.get("executor", "local"),
            jobs=jobs,
            device=device,
            data_root=data_root,
            threads=threads,
            gpus_per_cell=gpus_per_cell,
            cells_per_gpu=cells_per_gpu,
            track=_names(track) if track else None,
            slurm=options,
            retry_failed=retry_failed,
            wait=not no_wait,
            watcher=watcher,
        )
    print_table(table, console)
    console.out(f"tables: {output}/robustness.csv .md .tex .parquet   pictures: {output}/figures", highlight=False)


@main.command()
@click.option("-o", "--output", type=_OUTPUT, default=Path("runs"), show_default=True, help="folder of run folders")
@_settings
@_machine
def train(output: Path, device: str | None, data_root: Path | None, **flags: str | bool | None) -> None:
    """Train one model and keep its checkpoint, without bounds or attacks.

    \b
    certify train --dataset digits --threshold 1 -o runs
    """
    if flags["threshold"] is None and flags["preset"] is None:
        flags["threshold"] = "1"
    grid = _spec(None, flags)
    from .experiments.stages import train_one

    train_one(grid, output, device=device or "cpu", data_root=data_root, console=_console())


@main.command()
@click.argument("model")
@click.option("--checkpoint", type=click.Path(path_type=Path), default=None, help="weights of a module:function model")
@click.option("--dataset", default=None, help=f"data of a module:function model: {HELP['dataset']}")
@click.option("--norm", default="l2", show_default=True, help="l2, linf or l1")
@click.option("--method", default="product", show_default=True, help=HELP["bound"])
@click.option("--budget", default="60s", show_default=True,
              help="time that a method may take beyond the product, such as 90, 90s or 2m")  # fmt: skip
@click.option("--solver", default=None, help="of lipsdp and lipsdp-layer: built-in, clarabel, scs or mosek [built-in]")
@click.option("--certificate", type=click.Path(dir_okay=False, path_type=Path), default=None, metavar="FILE",
              help="also certify test samples, and write the certificate here")  # fmt: skip
@click.option("--samples", type=int, default=None, help="how many test samples to certify, from the first on "
              "[all; to compare local radii 100]")  # fmt: skip
@click.option("--arithmetic", default=None, help="real, float64, float32, float16 or bfloat16, for the certificate or "
              "local radii [that of the run, or of the model's own tensors]")  # fmt: skip
@_machine
def bound(
    model: str,
    checkpoint: Path | None,
    dataset: str | None,
    norm: str,
    method: str,
    budget: str,
    solver: str | None,
    certificate: Path | None,
    samples: int | None,
    arithmetic: str | None,
    device: str | None,
    data_root: Path | None,
) -> None:
    """Bound the Lipschitz constants of MODEL: a run folder, or module:function.

    \b
    certify bound runs/3f2a9c0d1e4b
    certify bound runs/3f2a9c0d1e4b --method auto --budget 2m
    certify bound runs/3f2a9c0d1e4b --method local --samples 200
    certify bound runs/3f2a9c0d1e4b --certificate net.json --samples 100
    certify bound mynet:build --checkpoint weights.safetensors --dataset mnist --norm linf
    """
    if certificate is None and method != "local" and (samples is not None or arithmetic is not None):
        raise ConfigError(
            "--samples and --arithmetic are for a certificate or local radii; give --certificate FILE or --method local"
        )
    if certificate is not None and method == "local":
        raise ConfigError("a certificate can't hold local radii; give another --method, such as auto")
    from .experiments.bound_stage import BoundRequest, bound_one
    from .experiments.certify_stage import certify_one, check_request
    from .experiments.stages import open_model

    request = BoundRequest(norm, method, budget, solver, samples, arithmetic)
    opened = open_model(model, checkpoint=checkpoint, dataset=dataset, data_root=data_root, device=device or "cpu")
    if certificate is not None:
        check_request(opened, certificate, arithmetic, samples)
    console = _console()
    bound_one(opened, request, console=console)
    if certificate is not None:
        certify_one(opened, certificate, request, console=console)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="a run folder, or module:function")
@click.option("--checkpoint", type=click.Path(path_type=Path), default=None, help="weights of a module:function model")
@click.option(
    "--dataset", "--data", default=None, help=f"data of a module:function model, whose test part was certified: "
    f"{HELP['dataset']}"
)  # fmt: skip
@_machine
def verify(
    file: Path,
    model: str,
    checkpoint: Path | None,
    dataset: str | None,
    device: str | None,
    data_root: Path | None,
) -> None:
    """Prove a certificate again, in exact and in interval arithmetic, with code that shares none with its making.

    Prints "valid" or "invalid" and the first claim that fails; the exit code is then 1.

    \b
    certify verify net.json --model runs/3f2a9c0d1e4b
    certify verify net.json --model mynet:build --checkpoint weights.safetensors --data mnist
    """
    from .experiments.certify_stage import verify_one
    from .experiments.stages import open_model

    opened = open_model(model, checkpoint=checkpoint, dataset=dataset, data_root=data_root, device=device or "cpu")
    if not verify_one(file, opened, console=_console()).valid:
        sys.exit(1)


@main.command()
@click.argument("model")
@click.option("--checkpoint", type=click.Path(path_type=Path), default=None, help="weights of a module:function model")
@click.option("--dataset", default=None, help=f"data of a module:function model: {HELP['dataset']}")
@click.option("--attacks", default=None, help=HELP["attacks"] + " [those of the run]")
@click.option("--norm", default=None, help="l2, linf or l1 [that of the run]")
@click.option("--eps", default=None, help=HELP["eps"] + " [those of the run]")
@click.option("--samples", default=None, help="how many test samples to attack [as many as the run]")
@click.option("--seed", default=None, help="seed of the attacks [that of the run]")
@click.option("--schedule", default=None, help=HELP["attack_schedule"] + " [that of the run]")
@click.option("--audit/--no-audit", default=None, help=HELP["audit"] + " [as the run]")
@click.option("--integer-pixels/--no-integer-pixels", default=None, help=HELP["integer_pixels"] + " [as the run]")
@click.option("--max-gradients", default=None, help=HELP["max_gradients"] + " [as many as the run]")
@click.option("--max-seconds", default=None, help=HELP["max_seconds"] + " [as long as the run]")
@click.option("--batch-size", type=click.IntRange(min=1), default=None, help="samples attacked at once [what fits]")
@click.option("--output", type=_OUTPUT, default=None, help="new folder for rows, attempts, adversarial examples, "
              "pictures and a summary")  # fmt: skip
@_machine
def attack(
    model: str,
    checkpoint: Path | None,
    dataset: str | None,
    device: str | None,
    data_root: Path | None,
    samples: str | None,
    schedule: str | None,
    batch_size: int | None,
    output: Path | None,
    **flags: str | bool | None,
) -> None:
    """Attack MODEL (a run folder, or module:function) and hold the result against its certificate.

    Any classifier will do: one that has no certificate is attacked all the same. "unset" lifts a limit of the run.

    \b
    certify attack runs/3f2a9c0d1e4b --attacks pgd,ddn --eps 0.1,0.5 --samples 200
    certify attack runs/3f2a9c0d1e4b --attacks autoattack,fmn --audit --output found
    certify attack mynet:build --checkpoint weights.safetensors --dataset mnist --norm linf --eps 0.1
    """
    settings = parse_settings({**flags, "attack_samples": samples, "attack_schedule": schedule})
    from .experiments.attack_stage import attack_one
    from .experiments.stages import open_model

    opened = open_model(model, checkpoint=checkpoint, dataset=dataset, data_root=data_root, device=device or "cpu")
    try:
        attack_one(opened, settings, console=_console(), output=output, batch_size=batch_size)
    except KeyboardInterrupt:
        _fail("interrupted; the same command begins anew", 130)


@main.command()
@click.argument("folder", type=_FOLDER)
@click.option("--state", type=click.Choice(["done", "running", "failed", "interrupted", "pending"]), default=None,
              help="list only the cells in this state")  # fmt: skip
@click.option("--watch", type=float, default=None, metavar="SECONDS", help="show it live, read anew so often")
def status(folder: Path, state: str | None, watch: float | None) -> None:
    """Say what the cells of the study in FOLDER do: progress, time to go, errors.

    \b
    certify status runs
    certify status runs --watch 5
    """
    if watch is not None and watch <= 0:
        raise click.BadParameter(f"expected a number > 0, got {watch:g}", param_hint="--watch")
    from .experiments.status import watch_status

    watch_status(folder, _console(), state=state, every_s=watch)


@main.command()
@click.argument("folder", type=_FOLDER)
@click.option(
    "--forget", is_flag=True, help="forget planned cells that were not begun, so that no table waits for them"
)
def cancel(folder: Path, forget: bool) -> None:
    """Stop the runs that work on the study in FOLDER, and their Slurm jobs; what is finished stays.

    \b
    certify cancel runs
    """
    from .experiments.study import cancel as cancel_runs
    from .experiments.study import forget_plans

    found = cancel_runs(folder)
    for record in found:
        click.echo(f"cancelled: {record}")
    if not found:
        click.echo("no run is at work there")
    if forget:
        forget_plans(folder)


@main.command()
@click.argument("folder", type=_FOLDER)
@click.argument("cell")
@click.option("-n", "--lines", type=click.IntRange(min=1), default=None, help="only the last lines")
def logs(folder: Path, cell: str, lines: int | None) -> None:
    """Print the log of CELL, the beginning of an id of `certify status`, in the study in FOLDER.

    \b
    certify logs runs 3f2a
    """
    from .experiments.status import find_cell, read_log

    click.echo(read_log(find_cell(folder, cell), lines))


@main.command()
@click.argument("folder", type=_FOLDER)
@click.option("--per-seed", is_flag=True, help="a row a seed, not the mean over seeds")
@click.option("--eps", default=None, help="only these perturbation sizes")
@click.option(
    "--by", default=None, metavar="FIELDS", help="a row a combination of these settings, e.g. model,threshold"
)
@click.option("--rows", default=None, metavar="FIELDS", help="settings down the side of a pivot of --value")
@click.option("--columns", default=None, metavar="FIELDS", help="settings across the top of a pivot of --value")
@click.option("--value", default=None, metavar="RESULT", help="result in a pivot, e.g. certified_accuracy_eps_0.3")
@click.option("--file", "path", type=click.Path(dir_okay=False, path_type=Path), default=None,
              help="write to FILE.csv, .md, .tex or .parquet, by its ending, and not to the terminal")  # fmt: skip
def table(
    folder: Path,
    per_seed: bool,
    eps: str | None,
    by: str | None,
    rows: str | None,
    columns: str | None,
    value: str | None,
    path: Path | None,
) -> None:
    """Print the robustness table of the runs in FOLDER, or a pivot of one result, or write it to a file.

    \b
    certify table runs --eps 0.3 --file robustness.tex
    certify table runs --by model,constraint
    certify table runs --rows constraint --columns threshold --value certified_accuracy_eps_0.3
    """
    pivot = [rows, columns, value]
    if any(pivot) and (not all(pivot) or by or per_seed):
        raise ConfigError("a pivot takes --rows, --columns and --value, and neither --by nor --per-seed")
    if by and per_seed:
        raise ConfigError("--by and --per-seed: expected one of them; --by ...,seed gives a row a seed")
    chosen = None if eps is None else CellConfig(**parse_settings({"eps": eps})).eps
    if any(pivot) and chosen is not None and len(chosen) != 1:
        raise ConfigError(f"--eps: expected one value for a pivot, got {len(chosen)}")
    from .experiments.table_writers import print_table, write_table
    from .experiments.tables import pivot_table, robustness_table

    if rows and columns and value:
        found = pivot_table(folder, _names(rows), _names(columns), value, eps=None if chosen is None else chosen[0])
    else:
        found = robustness_table(folder, aggregate=not per_seed, eps=chosen, by=_names(by) if by else None)
    if path is None:
        print_table(found, _console())
    else:
        write_table(found, path)


@main.command()
@click.argument("folder", type=_FOLDER)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default=None,
              help="the page [FOLDER/report.html]")  # fmt: skip
def report(folder: Path, output: Path | None) -> None:
    """Write one self-contained HTML page on the study in FOLDER: tables, curves, bounds, images, settings.

    \b
    certify report runs
    """
    from .experiments.report import write_report

    click.echo(write_report(folder, output or folder / "report.html"))


@main.command()
@click.argument("folder", type=_FOLDER)
@click.option("-o", "--output", type=_OUTPUT, default=None, help="folder of the pictures [FOLDER/figures]")
def plot(folder: Path, output: Path | None) -> None:
    """Draw the pictures of the runs in FOLDER, as PDF and PNG.

    \b
    certify plot runs -o figures
    """
    from .experiments.plots import write_figures

    for path in write_figures(folder, output or folder / "figures"):
        click.echo(path)


@main.command("audit-model")
@click.argument("model")
@click.option("--checkpoint", type=click.Path(path_type=Path), default=None, help="weights of a module:function model")
@click.option("--dataset", default=None, help=f"data of a module:function model: {HELP['dataset']}")
@click.option("--input-shape", default=None, metavar="SIZES", help="shape of an input, for no data set: 1,28,28")
@click.option("--classes", type=click.IntRange(min=2), default=10, show_default=True, help="with --input-shape")
@click.option("--norm", default="l2", show_default=True, help="l2, linf or l1")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), default=None,
              help="write all of it to this file too")  # fmt: skip
@_machine
def audit_model(
    model: str,
    checkpoint: Path | None,
    dataset: str | None,
    input_shape: str | None,
    classes: int,
    norm: str,
    json_path: Path | None,
    device: str | None,
    data_root: Path | None,
) -> None:
    """Say of MODEL (a run folder, or module:function) how each layer is bounded, and what mistaken tools would claim.

    Where it can't be certified all reasons are listed at once, with what to do about each; the exit code is then 1.

    \b
    certify audit-model runs/3f2a9c0d1e4b
    certify audit-model mynet:build --checkpoint weights.safetensors --input-shape 3,32,32 --json audit.json
    """
    from .experiments.audit_command import audit_one

    audit = audit_one(
        model,
        console=_console(),
        checkpoint=checkpoint,
        dataset=dataset,
        input_shape=input_shape,
        classes=classes,
        norm=norm,
        device=device or "cpu",
        data_root=data_root,
        json_path=json_path,
    )
    if audit.problems:
        count = "1 problem" if len(audit.problems) == 1 else f"{len(audit.problems)} problems"
        raise click.ClickException(f"{model} can't be certified: {count}, listed above")


@main.command()
def doctor() -> None:
    """Say what this machine can do, and which float assumptions of the certificates hold on it.

    \b
    certify doctor
    """
    from .experiments.precision import check_machine, exact_float32, report

    exact_float32()  # as `certify run` does
    checks = check_machine()
    for line in report(checks):
        click.echo(line)
    if any(check.holds is False for check in checks):
        raise click.ClickException("an assumption of the certificates does not hold on this machine")
