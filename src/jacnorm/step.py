"""The command line of a step: typed options in, one clear sentence out when something is wrong.

A step module ends with ``run({...})``; each entry is a subcommand made from the signature of a function, whose first
parameter is a `Settings` class. ``python -m jacnorm.studies.stability.measure depth --help`` documents every option.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tyro

from jacnorm.errors import UserError


def run(commands: Mapping[str, Callable[..., Any]], arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, call the chosen function and exit: 0 done, 2 a mistake to mend, 1 a bug.

    commands: functions by the name of their subcommand; a single one may be left unnamed.

    Mistakes are `UserError` and the package's own kinds of ValueError; ``JACNORM_DEBUG=1`` keeps their traceback.
    """
    # Two threads in one process contend: several times slower on small matrices, and not bit-repeatable.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    try:
        options: dict[str, Any] = {"prog": _program(), "args": arguments, "config": (tyro.conf.OmitArgPrefixes,)}
        if len(commands) == 1:
            ((name, command),) = commands.items()
            words = list(sys.argv[1:] if arguments is None else arguments)
            options["args"] = words[1:] if words[:1] == [name] else words
            tyro.cli(command, **options)
        else:
            tyro.extras.subcommand_cli_from_dict(dict(commands), **options)
    except UserError as error:
        _stop(str(error))
    except ValueError as error:
        if not any(kind.__module__.startswith("jacnorm.") for kind in type(error).__mro__):
            _bug(error)
        _stop(str(error))
    except Exception as error:
        _bug(error)


def _stop(sentence: str) -> None:
    if os.environ.get("JACNORM_DEBUG"):
        traceback.print_exc()
    print(f"ERROR: {sentence}", file=sys.stderr)
    sys.exit(2)


def _bug(error: Exception) -> None:
    traceback.print_exc()
    print(
        f"ERROR: this is a bug in jacnorm ({type(error).__name__}); please report it with the lines above",
        file=sys.stderr,
    )
    sys.exit(1)


def _program() -> str | None:
    """How the step was called, for its help text."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else None
