"""The command line: `daft-domainbed NAME ...`, and what every command in scripts/ shares.

A command is a file `scripts/NAME.py` with `build_parser()`, `main(argv) -> int` and a docstring: its first line is the
summary in the list of commands, the lines under `Example:` are shown as they stand. The list is read from the sources,
so that nothing heavy is imported for `--help` or a mistyped name.
"""

from __future__ import annotations

import argparse
import ast
import errno
import inspect
import itertools
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from daft_domainbed import __doc__ as PACKAGE_SUMMARY
from daft_domainbed._version import __version__
from daft_domainbed.errors import DISK_FULL, RunError, UsageError, suggest
from daft_domainbed.runtime.stopping import Stopped
from daft_domainbed.runtime.streams import mend_streams

PROGRAM = "daft-domainbed"
SCRIPTS = Path(__file__).parent / "scripts"

BAD_PATH = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}
INTERRUPTED = 130  # 128 + SIGINT, what shells report

Number = TypeVar("Number", int, float)


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that takes its help from a command's docstring and answers mistakes with one line.

    Flags are never abbreviated: an abbreviation that works today would mean something else after the next flag.

    Args:
        doc: The docstring of the command's module: summary, description, `Example:` lines.
        kwargs: As for `argparse.ArgumentParser`.

    Raises:
        UsageError: From `parse_args`, for any mistake; a mistyped flag or choice is answered with the nearest one.
    """

    def __init__(self, *, doc: str | None = None, **kwargs: Any) -> None:
        if doc is not None:
            description, examples = split_doc(doc)
            kwargs.setdefault("description", description)
            kwargs.setdefault("epilog", _format_epilog(examples))
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(**kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but name a mistyped flag before complaining of the required one it stood for."""
        arguments = list(sys.argv[1:] if args is None else args)
        own = arguments
        if any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in self._actions):
            # From a sub-command's or another program's name on, the flags are not this parser's.
            own = list(itertools.takewhile(lambda argument: argument.startswith("-"), arguments))
        self._refuse_unknown_flags(own)
        parsed, unexpected = super().parse_known_args(arguments, namespace)
        if unexpected:
            self.error(f"unexpected argument {unexpected[0]!r}: {self.prog} --help shows the flags and examples")
        return parsed, unexpected

    def error(self, message: str) -> NoReturn:
        """Raise UsageError where argparse would print its usage block."""
        raise UsageError(message.removeprefix("argument "))

    def _refuse_unknown_flags(self, arguments: Iterable[str]) -> None:
        for argument in arguments:
            if argument == "--":
                return
            flag = argument.partition("=")[0]
            # What argparse, too, takes for a flag: no negative number, no text with spaces in it.
            if re.fullmatch(r"--?[A-Za-z]\S*", flag) and flag not in self._option_string_actions:
                hint = suggest(f"--{flag.lstrip('-')}", self._option_string_actions)
                self.error(f"unknown flag {flag!r}.{hint} {self.prog} --help lists the flags")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            hint = suggest(str(value), names)
            raise argparse.ArgumentError(action, f"unknown value {value!r}.{hint} It takes: {', '.join(names)}")


def split_doc(doc: str) -> tuple[str, list[str]]:
    """Split a command's docstring into its description (from the summary on) and its example lines."""
    description, _, examples = inspect.cleandoc(doc).partition("\nExample:\n")
    return description.strip(), textwrap.dedent(examples).strip().splitlines()


def positive_int(text: str) -> int:
    """Argument type: a whole number of at least 1."""
    return _parse_number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def non_negative_int(text: str) -> int:
    """Argument type: a whole number of at least 0."""
    return _parse_number(text, int, lambda value: value >= 0, "a whole number of at least 0")


def fraction(text: str) -> float:
    """Argument type: a share of a whole, 0 <= value < 1."""
    return _parse_number(text, float, lambda value: 0 <= value < 1, "a fraction of at least 0 and below 1")


def _parse_number(
    text: str, convert: Callable[[str], Number], is_allowed: Callable[[Number], bool], wanted: str
) -> Number:
    try:
        value = convert(text)
    except ValueError:
        value = None
    if value is None or not is_allowed(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def find_commands() -> list[str]:
    """Return the names of the commands: the files in scripts/ without a leading underscore."""
    return sorted(path.stem for path in SCRIPTS.glob("*.py") if not path.stem.startswith("_"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `daft-domainbed ARGV` and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = arguments[:1] == ["--debug"]
    name, *rest = arguments[debug:] or [""]
    commands = find_commands()
    if name in commands:
        return run_command(name, rest + arguments[:debug])
    return _guard(PROGRAM, lambda: _answer(name, commands), debug)


def run_command(name: str, argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; failures become one line on standard error.

    Args:
        name: A command, as `find_commands` lists them.
        argv: Its arguments, sys.argv[1:] if not given. `--debug` among them adds the traceback to a failure's line.

    Returns:
        0 done, 1 failed, 2 bad usage or bad input, 130 or 143 stopped by SIGINT or SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments

    def call() -> int:
        script = import_module(f"daft_domainbed.scripts.{name}")
        return script.main([argument for argument in arguments if argument != "--debug"])

    return _guard(f"{PROGRAM} {name}", call, debug)


def _guard(program: str, call: Callable[[], int], debug: bool) -> int:
    mend_streams()
    try:
        try:
            return call()
        finally:
            # Now, not at the interpreter's exit, where a closed pipe (`| head`) or a full disk still makes noise.
            sys.stdout.flush()
    except KeyboardInterrupt:
        status, message = INTERRUPTED, "interrupted; give the same command again to go on from here"
    except Stopped as stopped:
        status, message = stopped.exit_status, str(stopped)
    except Exception as error:
        is_pipe = isinstance(error, BrokenPipeError)
        if not _can_print("\n" if is_pipe else "") and is_pipe:
            return RunError.exit_status
        if debug:
            traceback.print_exc()
        status, message = _describe_failure(error)
    print(f"{program}: {' '.join(message.splitlines())}", file=sys.stderr)
    return status


def _answer_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Let a script that is a command line of its own end in one line where it is wrong before `main` is reached."""
    if not isinstance(error, (UsageError, RunError)) or hasattr(sys, "ps1") or "--debug" in sys.argv:
        sys.__excepthook__(kind, error, trace)
        return
    print(f"{PROGRAM}: {' '.join(str(error).splitlines())}", file=sys.stderr)
    raise SystemExit(error.exit_status)


sys.excepthook = _answer_uncaught


def _describe_failure(error: Exception) -> tuple[int, str]:
    """Return the exit status and the line for a command's failure."""
    if isinstance(error, (UsageError, RunError)):
        return error.exit_status, str(error)
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        place = f" at {error.filename!r}" if error.filename else ""
        return RunError.exit_status, f"the disk is full{place}: free some space and give the same command again"
    if isinstance(error, OSError) and error.errno in BAD_PATH and error.filename:
        reason = (error.strerror or type(error).__name__).lower()
        return UsageError.exit_status, f"cannot use {error.filename!r} ({reason}): check the path and its permissions"
    advice = f"{PROGRAM} doctor checks the installation; " if isinstance(error, ImportError) else ""
    return (
        RunError.exit_status,
        f"unexpected {type(error).__name__}: {error} ({advice}run again with --debug for the traceback)",
    )


def _can_print(probe: str) -> bool:
    """Tell whether standard output still takes text; if not, send what it holds to the null device."""
    try:
        print(end=probe, flush=True)
    except OSError:
        with suppress(OSError):  # a notebook's output has no number
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def _answer(name: str, commands: list[str]) -> int:
    """Answer a command line that names no command."""
    if name in ("-h", "--help"):
        print(_format_overview(commands))
    elif name == "--version":
        print(f"{PROGRAM} {__version__}")
    elif not name:
        print(_format_overview(commands), file=sys.stderr)
        return UsageError.exit_status
    else:
        kind = "flag" if name.startswith("-") else "command"
        hint = suggest(name, ["--help", "--version"] if kind == "flag" else commands)
        raise UsageError(f"unknown {kind} {name!r}.{hint} The commands are {', '.join(commands)}")
    return 0


def _format_overview(commands: list[str]) -> str:
    lines = [f"usage: {PROGRAM} NAME [flags]    (or: python -m daft_domainbed.scripts.NAME [flags])", ""]
    lines += [PACKAGE_SUMMARY or "", ""]
    for name in commands:
        tree = ast.parse((SCRIPTS / f"{name}.py").read_text(encoding="utf-8"))
        description, examples = split_doc(ast.get_docstring(tree) or "")
        summary = description.partition("\n")[0]
        lines += [f"  {name:<18}{summary}"] + [f"  {'':<18}  {example}" for example in examples[:1]]
    lines += ["", f"{PROGRAM} NAME --help   a command's flags and examples"]
    lines += [f"{PROGRAM} --version     the version of this package"]
    return "\n".join(lines)


def _format_epilog(examples: list[str]) -> str:
    lines = ["examples:", *(f"  {example}" for example in examples), ""] if examples else []
    return "\n".join([*lines, "Every command also takes --debug: the traceback of a failure, too."])


if __name__ == "__main__":
    sys.exit(main())
