"""The command line: `gdfast train`, `val`, `predict`, `export`, `data`, `bench`, `doctor`.

A command's module is imported only when that command is asked for, and torch only when it runs, so
that help and mistakes in the options are answered at once.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

import gdfast
from gdfast.errors import UserError

_COMMANDS = {
    "train": ("gdfast.cli.train", "train a model and leave its results in a folder"),
    "val": ("gdfast.cli.val", "measure a trained model on the test part of its data"),
    "predict": ("gdfast.cli.predict", "ask a trained model what images show"),
    "export": ("gdfast.cli.export", "write a trained model as ONNX"),
    "data": ("gdfast.cli.data", "look at data, or for what is wrong with it"),
    "bench": ("gdfast.bench", "measure our kernels beside native PyTorch's"),
    "doctor": ("gdfast.doctor", "tell what this installation can do, and test it"),
}
_USAGE_STATUS = 2


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        self.exit(_USAGE_STATUS, f"{self.prog}: {message} (--help tells more)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0: done. 1: it ran, and failed (a self-test, a wrong result). 2: something that the user can
    put right, told in one line. 130: interrupted. Anything else that goes wrong is a mistake of
    ours and keeps its trace.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        args = _parse(arguments)
        _show_warnings_in_one_line()
        _check_backend(args)
        for stream in (sys.stdout, sys.stderr):  # names of files may be anything
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        status: int = args.main(args)
        sys.stdout.flush()
        return status
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # The reader (`| head`) has gone. Nothing can be said; keep exit from flushing again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + 13
        print(f"gdfast: {_in_words(error)}", file=sys.stderr)
        return _USAGE_STATUS
    except KeyboardInterrupt:
        print("gdfast: interrupted", file=sys.stderr)
        return 130


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="gdfast", description=gdfast.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"gdfast {gdfast.__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Parser
    )
    wanted = next((word for word in arguments if not word.startswith("-")), None)
    for name, (module_name, summary) in _COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=f"{summary.capitalize()}.", allow_abbrev=False
        )
        if name == wanted:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(main=module.main)
    return parser.parse_args(arguments)


def _check_backend(args: argparse.Namespace) -> None:
    # Also the first import of the kernels, which reads GDFAST_BACKEND and GDFAST_CPU_ISA.
    try:
        backends = importlib.import_module("gdfast.backends")
        backends.canonical(getattr(args, "backend", None) or "auto")
    except ValueError as error:
        raise UserError(str(error)) from None


def _show_warnings_in_one_line() -> None:
    def show(message: Warning | str, category: type[Warning], *where: object) -> str:
        return f"gdfast: warning: {message}\n"

    warnings.formatwarning = show  # type: ignore[assignment]


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
