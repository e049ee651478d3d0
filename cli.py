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
from .experiments.config import CellConfig, ConfigError, RunSpec
from .experiments.flags import HELP, default_text, parse_settings

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
    """One flag for each field of `CellConfig`; lists may be named in the plural too."""
    for key in reversed(HELP):
        names = [f"--{key.replace('_', '-')}"]
        if key in ("constraint", "threshold", "seed"):
            names.append(f"--{key}s")
        command = click.option(*names, key, default=None, help=f"{HELP[key]} [{default_text(key)}]")(command)
    return command


def _machine(command: Command) -> Command:
    for option in (
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N"),
        click.option("--data-root", type=_OUTPUT, default=None, help="folder of the public data sets [SPECCERT_DATA]"),
    ):
        command = option(command)
    return command


def _spec(path: Path | None, flags: dict[str, str | None]) -> RunSpec:
    """The grid of a spec file, or of the data set's defaults, with the given flags on top."""
    settings = parse_settings(flags)
    if path is None:
        return RunSpec.from_mapping(settings)
    return RunSpec.from_toml(path, overrides=settings)


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
    certify doctor                         what this machine can do
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@main.command()
@click.argument("spec", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", type=_OUTPUT, default=Path("runs"), show_default=True, help="folder of run folders")
@click.option("--executor", default="local", show_default=True, help="inline (this process) or local (several)")
@click.option("--jobs", type=int, default=None, help="processes of the local executor [one a core, or one a GPU]")
@_settings
@_machine
def run(
    spec: Path | None,
    output: Path,
    executor: str,
    jobs: int | None,
    device: str,
    data_root: Path | None,
    **flags: str | None,
) -> None:
    """Train, bound, certify and attack every threshold; print the robustness table.

    SPEC is a TOML file of the settings below (dashes as underscores); flags win over it. Finished cells are kept: the
    same command goes on where it was interrupted.

    \b
    certify run
    certify run --dataset mnist --data-root data --thresholds 0.5,1,2,inf --seeds 0,1,2 --jobs 2
    """
    grid = _spec(spec, flags)
    from .experiments.console import LiveRun
    from .experiments.sweep import run as run_grid
    from .experiments.tables import print_table

    console = _console()
    with LiveRun(console) as watcher:
        table = run_grid(
            grid,
            output,
            executor=executor,
            jobs=jobs,
            device=device,
            data_root=data_root,
            watcher=watcher,
        )
    print_table(table, console)
    console.out(f"tables: {output}/robustness.csv .md .tex   pictures: {output}/figures", highlight=False)


@main.command()
@click.option("-o", "--output", type=_OUTPUT, default=Path("runs"), show_default=True, help="folder of run folders")
@_settings
@_machine
def train(output: Path, device: str, data_root: Path | None, **flags: str | None) -> None:
    """Train one model and keep its checkpoint, without bounds or attacks.

    \b
    certify train --dataset digits --threshold 1 -o runs
    """
    grid = _spec(None, {**flags, "threshold": flags["threshold"] or "1"})
    from .experiments.stages import train_one

    train_one(grid, output, device=device, data_root=data_root, console=_console())


@main.command()
@click.argument("model")
@click.option("--checkpoint", type=click.Path(path_type=Path), default=None, help="weights of a module:function model")
@click.option("--dataset", default=None, help=f"data of a module:function model: {HELP['dataset']}")
@click.option("--norm", default="l2", show_default=True, help="l2, linf or l1")
@click.option("--method", default="product", show_default=True, help=HELP["bound"])
@_machine
def bound(
    model: str,
    checkpoint: Path | None,
    dataset: str | None,
    norm: str,
    method: str,
    device: str,
    data_root: Path | None,
) -> None:
    """Bound the Lipschitz constants of MODEL: a run folder, or module:function.

    \b
    certify bound runs/3f2a9c0d1e4b
    certify bound mynet:build --checkpoint weights.safetensors --dataset mnist --norm linf
    """
    from .experiments.stages import bound_one, open_model

    opened = open_model(model, checkpoint=checkpoint, dataset=dataset, data_root=data_root, device=device)
    bound_one(opened, norm=norm, method=method, console=_console())


@main.command()
@click.argument("model")
@click.option("--checkpoint", type=click.Path(path_type=Path), default=None, help="weights of a module:function model")
@click.option("--dataset", default=None, help=f"data of a module:function model: {HELP['dataset']}")
@click.option("--attacks", default=None, help=HELP["attacks"] + " [those of the run]")
@click.option("--norm", default=None, help="l2, linf or l1 [that of the run]")
@click.option("--eps", default=None, help=HELP["eps"] + " [those of the run]")
@click.option("--samples", default=None, help="how many test samples to attack [as many as the run]")
@click.option("--seed", default=None, help="seed of the attacks and of the choice of samples [that of the run]")
@_machine
def attack(
    model: str,
    checkpoint: Path | None,
    dataset: str | None,
    device: str,
    data_root: Path | None,
    attacks: str | None,
    norm: str | None,
    eps: str | None,
    samples: str | None,
    seed: str | None,
) -> None:
    """Attack MODEL (a run folder, or module:function) and hold the result against its certificate.

    \b
    certify attack runs/3f2a9c0d1e4b --attacks pgd,ddn --eps 0.1,0.5 --samples 200
    """
    settings = parse_settings({"attacks": attacks, "norm": norm, "eps": eps, "attack_samples": samples, "seed": seed})
    from .experiments.stages import attack_one, open_model

    opened = open_model(model, checkpoint=checkpoint, dataset=dataset, data_root=data_root, device=device)
    attack_one(opened, settings, console=_console())


@main.command()
@click.argument("folder", type=_FOLDER)
@click.option("--per-seed", is_flag=True, help="a row a seed, not the mean over seeds")
@click.option("--eps", default=None, help="only these perturbation sizes")
@click.option("--file", "path", type=click.Path(dir_okay=False, path_type=Path), default=None,
              help="write to FILE.csv, .md or .tex, by its ending, and not to the terminal")  # fmt: skip
def table(folder: Path, per_seed: bool, eps: str | None, path: Path | None) -> None:
    """Print the robustness table of the runs in FOLDER, or write it to a file.

    \b
    certify table runs --eps 0.3 --file robustness.tex
    """
    chosen = None if eps is None else CellConfig(**parse_settings({"eps": eps})).eps
    from .experiments.tables import print_table, robustness_table, write_table

    found = robustness_table(folder, aggregate=not per_seed, eps=chosen)
    if path is None:
        print_table(found, _console())
    else:
        write_table(found, path)


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


@main.command()
def doctor() -> None:
    """Say what this machine can do, and which float assumptions of the certificates hold on it.

    \b
    certify doctor
    """
    from .experiments.precision import check_machine, exact_float32

    exact_float32()  # as `certify run` does
    checks = check_machine()
    marks = {None: "    ", True: "ok  ", False: "FAIL"}
    for check in checks:
        click.echo(f"{marks[check.holds]} {check.name}: {check.found}")
    if any(check.holds is False for check in checks):
        raise click.ClickException("an assumption of the certificates does not hold on this machine")
