"""The ``embtables`` command.

Only the sub-command that was asked for is imported: ``embtables --help`` is quick, and a broken optional
dependency of one sub-command breaks that one alone.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import typer

from embtables._util.interrupts import interruptible

_INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """A sub-command: what the overview says of it, and where its function (or typer app) is defined.

    ``interrupted``: what is there after an interrupt, and what to do then.
    """

    name: str
    help: str
    module: str
    attribute: str
    interrupted: str = ""
    is_group: bool = False

    def load(self) -> object:
        return getattr(importlib.import_module(self.module), self.attribute)


COMMANDS = (
    Command(
        "recommend",
        "Say which tables to take within a byte budget.",
        "embtables.cli.recommend",
        "recommend",
        "The same command goes on.",
    ),
    Command(
        "prepare",
        "Turn raw files into prepared data: Parquet shards and a manifest.",
        "embtables.cli.prepare",
        "app",
        "Nothing was written.",
        is_group=True,
    ),
    Command("plan", "Show the tables a method makes of a byte budget.", "embtables.cli.sweep", "plan"),
    Command(
        "probe",
        "Find out what tables are worth, and which method does best.",
        "embtables.cli.probe",
        "probe",
        "The same command goes on with the short trainings.",
    ),
    Command(
        "train",
        "Train one model with one method at one budget.",
        "embtables.cli.train",
        "train",
        "The same command goes on from the last checkpoint in OUT, where there is one.",
    ),
    Command(
        "sweep",
        "Train method × budget × seed; resumes.",
        "embtables.cli.sweep",
        "sweep",
        "Finished cells are kept: the same command goes on.",
    ),
    Command(
        "report",
        "Table and figure of a sweep.",
        "embtables.cli.sweep",
        "report",
        "The sweep is as it was; the same command makes what is missing of the report.",
    ),
    Command(
        "export",
        "Write the served tables and the model of a run.",
        "embtables.cli.train",
        "export",
        "The run is as it was; OUT holds a whole export or none.",
    ),
    Command(
        "bundle",
        "Write a run with all that it takes to score raw rows.",
        "embtables.cli.bundle",
        "bundle",
        "The run is as it was; OUT holds a whole bundle or none.",
    ),
    Command(
        "predict",
        "Score the raw rows of a file by a bundle.",
        "embtables.cli.bundle",
        "predict",
        "Nothing was written.",
    ),
    Command(
        "versions",
        "Replace served tables while they are read: versions, and deltas between them.",
        "embtables.cli.versions",
        "app",
        "The current version is a whole one: the same command may be run again.",
        is_group=True,
    ),
)

EPILOG = """Examples:

\b
  embtables prepare synthetic - data/demo
  embtables recommend data/demo --budget 1% --out runs/recommended
  embtables plan data/demo --method hash --budget 10%
  embtables sweep data/demo --methods full,hash,compositional --budgets 50%,10%,1% --seeds 3 --out runs/demo
  embtables report runs/demo

EMBTABLES_TRACEBACK=1 shows where an error was raised."""


def _print_version(wanted: bool) -> None:
    if wanted:
        from embtables import __version__

        typer.echo(f"embtables {__version__}")
        raise typer.Exit()


def _root(
    show_version: bool = typer.Option(
        False, "--version", help="Show the version and exit.", callback=_print_version, is_eager=True
    ),
) -> None:
    """Compressed embedding tables: a byte budget in, CTR models and their accuracy-memory curve out."""


def _not_loaded() -> None:
    """Stands for a sub-command that this call does not use."""


def build(wanted: str | None) -> typer.Typer:
    """The app, with the sub-command `wanted` imported and the others present by name and help only."""
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        epilog=EPILOG,
        rich_markup_mode=None,  # examples hold square brackets, which markup swallows
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for command in COMMANDS:
        if command.name != wanted:
            app.command(command.name, help=command.help)(_not_loaded)
        elif command.is_group:
            app.add_typer(command.load(), name=command.name, help=command.help)  # type: ignore[arg-type]
        else:
            function: Callable[..., object] = command.load()  # type: ignore[assignment]
            app.command(command.name)(function)
    return app


def main() -> NoReturn:
    """The console script: runs ``sys.argv`` and ends the process with its exit code."""
    with interruptible() as received:
        code = run(sys.argv[1:])
        try:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        except BrokenPipeError:
            pass
        except KeyboardInterrupt:  # the work was done, or is cleared away
            code = code or received.code
    # Not sys.exit: pyarrow's threads, where they have only just started, abort the process in the destructors of C++
    # ("terminate called without an active exception"), and its exit code is lost.
    os._exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code.

    Wrong input (`ValueError`, `OSError`, a missing dependency, a NaN) is one sentence on stderr and code 2;
    SIGINT is code 130, SIGTERM 143.
    """
    wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
    with interruptible() as received:
        try:
            code = _run(arguments, wanted)
        except Exception:
            if received.number is None:
                raise
            code = _INTERRUPTED
    # What an interrupt meets may make another error of it.
    if code == _INTERRUPTED or (code and received.number is not None):
        kept = next((command.interrupted for command in COMMANDS if command.name == wanted), "")
        fail(f"Interrupted. {kept}".rstrip())
        return received.code
    return code


def _run(arguments: Sequence[str], wanted: str | None) -> int:
    try:
        command = typer.main.get_command(build(wanted))
        _keep_end_of_file(command)
        # With standalone_mode=False an interrupt comes back as the number 130, an Exit as its code.
        code = command.main(args=list(arguments), prog_name="embtables", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (typer.Abort, KeyboardInterrupt):
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has gone: nobody is left to tell.
        return 1
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if os.environ.get("EMBTABLES_TRACEBACK"):
            raise
        return fail(sentence(error, arguments))
    except MemoryError as error:
        return fail(": ".join(filter(None, ["not enough memory", " ".join(str(error).split())])))
    except Exception as error:
        # Usage errors: typer's own class moved between its releases; all of them can show themselves.
        show, usage_code = getattr(error, "show", None), getattr(error, "exit_code", None)
        if show is None or usage_code is None:
            raise
        _tell_fields(error, wanted)
        show()
        return int(usage_code)


def _tell_fields(error: Any, wanted: str | None) -> None:
    """Has the error of an unknown option say which fields of the configuration have its name."""
    option = getattr(error, "option_name", None)
    if wanted in ("train", "sweep") and isinstance(option, str) and not getattr(error, "possibilities", None):
        from embtables.training.config import homes

        # Each cell of a sweep has its own method, budget and seeds.
        of_cells = ("tables.method", "tables.budget", "tables.hash_seed", "training.seed") if wanted == "sweep" else ()
        places = [place for place in homes(option.strip("-").replace("-", "_")) if place not in of_cells]
        if places:
            error.message += f" ({' '.join(f'--set {place}=…' for place in places)} is the way)"


def _keep_end_of_file(command: Any) -> None:
    """Has a file that ends too early be an error as others are: typer takes ``EOFError`` for the user's."""
    for inner in getattr(command, "commands", {}).values():
        _keep_end_of_file(inner)
    callback = command.callback
    if callback is None:
        return

    @functools.wraps(callback)
    def calling(*arguments: Any, **options: Any) -> Any:
        try:
            return callback(*arguments, **options)
        except EOFError as error:
            raise ValueError(f"a file ends too early: {error}") from error

    command.callback = calling


def fail(message: str) -> int:
    typer.secho(f"Error: {message}", fg=typer.colors.RED, err=True)
    return 2


def sentence(error: Exception, arguments: Sequence[str] = ()) -> str:
    """What went wrong in one line; an error of the system that names no file is of one of the command's."""
    problems = getattr(error, "errors", None)
    if callable(problems):  # pydantic.ValidationError, without importing pydantic
        return "; ".join(_field_problem(problem) for problem in problems())
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename2 or error.filename}: {error.strerror}"  # of two, the second is the one to write
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        paths = [argument for argument in arguments if os.path.exists(argument)]
        return f"{error.strerror}, at {' or '.join(paths)}" if paths else error.strerror
    if isinstance(error, UnicodeError):
        return f"a text is not in the encoding that was expected: {error}"
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ImportError):
        return f"a part that this command needs cannot be imported: {text}"
    return text


def _field_problem(problem: dict[str, object]) -> str:
    location = problem.get("loc")
    field = ".".join(str(part) for part in location) if isinstance(location, tuple) else ""
    kind, message = problem.get("type"), str(problem.get("msg"))
    if kind == "extra_forbidden":
        return f"unknown field {field!r}"
    if kind == "missing":
        return f"field {field!r} is missing"
    message = message.removeprefix("Value error, ")
    got = problem.get("input")
    value = "" if isinstance(got, dict) else f", got {got!r}"
    return f"{field}: {message}{value}" if field else message
