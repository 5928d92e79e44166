from __future__ import annotations

import argparse
import errno
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daft_domainbed import cli
from daft_domainbed._version import __version__
from daft_domainbed.cli import ArgumentParser, fraction, non_negative_int, positive_int
from daft_domainbed.errors import RunError, UsageError

COMMANDS = cli.find_commands()

FakeCommand = Callable[[Callable[[Sequence[str]], int]], None]


@pytest.fixture
def fake_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeCommand:
    """Put a command named `fake` in place of the real ones."""

    def install(main: Callable[[Sequence[str]], int]) -> None:
        module = ModuleType("daft_domainbed.scripts.fake")
        module.main = main  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        (tmp_path / "fake.py").write_text('"""Do as told.\n\nExample:\n    daft-domainbed fake\n"""')
        (tmp_path / "_helper.py").write_text("")
        monkeypatch.setattr(cli, "SCRIPTS", tmp_path)

    return install


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="daft-domainbed fake", doc="Do it.\n\nAt length.\n\nExample:\n    daft-domainbed fake\n"
    )
    parser.add_argument("--dataset", required=True, choices=["PACS", "VLCS"])
    parser.add_argument("--steps", type=positive_int)
    parser.add_argument("--holdout_fraction", type=fraction)
    parser.add_argument("--shift", type=float)
    parser.add_argument("--test_envs", type=non_negative_int, nargs="+")
    parser.add_argument("files", nargs="*")
    return parser


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)


class TestOverview:
    def test_help_lists_commands_with_summary_and_example(
        self, fake_command: FakeCommand, capsys: pytest.CaptureFixture[str]
    ) -> None:
        fake_command(lambda argv: 0)
        assert cli.main(["--help"]) == 0
        out = capsys.readouterr().out
        assert "fake              Do as told.\n" in out
        assert "  daft-domainbed fake\n" in out
        assert "_helper" not in out

    def test_no_command_shows_the_overview_as_an_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert all(name in captured.err for name in COMMANDS)

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["--version"]) == 0
        assert capsys.readouterr().out == f"daft-domainbed {__version__}\n"

    @pytest.mark.parametrize(
        ("argument", "start"),
        [
            ("docter", "daft-domainbed: unknown command 'docter'. Did you mean 'doctor'?"),
            ("--verison", "daft-domainbed: unknown flag '--verison'. Did you mean '--version'?"),
            ("qqq", "daft-domainbed: unknown command 'qqq'. The commands are "),
        ],
    )
    def test_mistyped_command(self, argument: str, start: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([argument, "--dataset", "PACS"]) == 2
        err = capsys.readouterr().err
        assert err.startswith(start)
        assert err.count("\n") == 1


class TestCommands:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_docstring_holds_a_summary_and_examples_that_parse(self, name: str) -> None:
        script = import_module(f"daft_domainbed.scripts.{name}")
        description, examples = cli.split_doc(script.__doc__ or "")
        assert description.partition("\n")[0].endswith(".")
        assert examples
        for example in examples:
            program, command, *argv = shlex.split(example, comments=True)
            assert (program, command) == ("daft-domainbed", name)
            script.build_parser().parse_args(argv)

    @pytest.mark.parametrize("name", COMMANDS)
    def test_help_and_mistyped_flag(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == 0
        out = capsys.readouterr().out
        assert f"usage: daft-domainbed {name}" in out
        assert "examples:\n" in out
        assert cli.main([name, "--hlep"]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"daft-domainbed {name}: unknown flag '--hlep'. Did you mean '--help'?")
        assert err.count("\n") == 1

    def test_nothing_heavy_is_imported_for_help_or_mistakes(self) -> None:
        code = """
import contextlib, io, sys
from daft_domainbed import cli
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    for argv in [["--help"], ["--version"], ["no_command"], *([name, "--help"] for name in cli.find_commands())]:
        with contextlib.suppress(SystemExit):
            cli.main(argv)
print(sorted({"torch", "torchvision", "jinja2", "PIL"} & set(sys.modules)))
"""
        assert run_python("-c", code).stdout == "[]\n"

    def test_module_and_console_script_are_the_same(self) -> None:
        as_module = run_python("-m", "daft_domainbed.scripts.doctor", "--format", "yaml")
        as_command = run_python("-m", "daft_domainbed.cli", "doctor", "--format", "yaml")
        assert as_module.returncode == as_command.returncode == 2
        line = "daft-domainbed doctor: --format: unknown value 'yaml'. It takes: text, json\n"
        assert as_module.stderr == as_command.stderr == line


class TestFailures:
    @pytest.mark.parametrize(
        ("error", "status", "message"),
        [
            (UsageError("no data set 'PAC'"), 2, "no data set 'PAC'"),
            (UsageError("two\nlines"), 2, "two lines"),
            (RunError("the loss is nan at step 7"), 1, "the loss is nan at step 7"),
            (
                OSError(errno.ENOSPC, "No space left on device", "runs/a  b"),
                1,
                "the disk is full at 'runs/a  b': free some space and give the same command again",
            ),
            (
                OSError(errno.EDQUOT, "Disk quota exceeded"),
                1,
                "the disk is full: free some space and give the same command again",
            ),
            (
                PermissionError(errno.EACCES, "Permission denied", "/root/x"),
                2,
                "cannot use '/root/x' (permission denied): check the path and its permissions",
            ),
            (
                OSError(errno.EROFS, "Read-only file system", "/mnt/x"),
                2,
                "cannot use '/mnt/x' (read-only file system): check the path and its permissions",
            ),
            (
                ValueError("shape\nmismatch"),
                1,
                "unexpected ValueError: shape mismatch (run again with --debug for the traceback)",
            ),
            (
                ModuleNotFoundError("No module named 'x'"),
                1,
                "unexpected ModuleNotFoundError: No module named 'x' (daft-domainbed doctor checks the installation; "
                "run again with --debug for the traceback)",
            ),
            # Neither a user's path nor a reader that has gone: a failure like any other.
            (
                BrokenPipeError(errno.EPIPE, "Broken pipe"),
                1,
                "unexpected BrokenPipeError: [Errno 32] Broken pipe (run again with --debug for the traceback)",
            ),
            (KeyboardInterrupt(), 130, "interrupted; give the same command again to go on from here"),
        ],
    )
    def test_become_one_line(
        self,
        error: BaseException,
        status: int,
        message: str,
        fake_command: FakeCommand,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def fail(argv: Sequence[str]) -> int:
            raise error

        fake_command(fail)
        assert cli.main(["fake"]) == status
        assert capsys.readouterr().err == f"daft-domainbed fake: {message}\n"

    @pytest.mark.parametrize("argv", [["--debug", "fake", "--steps", "1"], ["fake", "--steps", "--debug", "1"]])
    def test_debug_adds_the_traceback_and_is_not_passed_on(
        self, argv: list[str], fake_command: FakeCommand, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fail(argv: Sequence[str]) -> int:
            raise UsageError(f"got {argv}")

        fake_command(fail)
        assert cli.main(argv) == 2
        first, *_, last = capsys.readouterr().err.splitlines()
        assert first == "Traceback (most recent call last):"
        assert last == "daft-domainbed fake: got ['--steps', '1']"

    @pytest.mark.parametrize("status", [0, 1])
    def test_exit_status_of_the_command_is_kept(self, status: int, fake_command: FakeCommand) -> None:
        fake_command(lambda argv: status)
        assert cli.main(["fake"]) == status

    def test_arguments_come_from_the_command_line_if_not_given(
        self, fake_command: FakeCommand, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Sequence[str]] = []

        def record(argv: Sequence[str]) -> int:
            seen.append(argv)
            return 0

        fake_command(record)
        monkeypatch.setattr(sys, "argv", ["doctor.py", "--format", "json"])
        assert cli.run_command("fake") == 0
        monkeypatch.setattr(sys, "argv", ["daft-domainbed", "fake", "--format", "text"])
        assert cli.main() == 0
        assert seen == [["--format", "json"], ["--format", "text"]]

    @pytest.mark.parametrize("options", [[], ["-u"]], ids=["buffered", "unbuffered"])
    def test_reader_that_has_gone_is_no_news(self, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
        command = [sys.executable, *options, "-m", "daft_domainbed.cli", "--help"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == 1

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
    @pytest.mark.parametrize("options", [[], ["-u"]], ids=["buffered", "unbuffered"])
    def test_full_disk_behind_standard_output(self, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
        command = [sys.executable, *options, "-m", "daft_domainbed.cli", "--help"]
        with open("/dev/full", "w") as full:
            result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert result.returncode == 1
        assert result.stderr == "daft-domainbed: the disk is full: free some space and give the same command again\n"


class TestArgumentParser:
    def test_reads_values(self) -> None:
        argv = ["--dataset", "PACS", "--steps=3", "--shift", "-1.5", "--test_envs", "0", "2", "--", "--odd", "x"]
        args = build_parser().parse_args(argv)
        assert (args.dataset, args.steps, args.shift, args.test_envs) == ("PACS", 3, -1.5, [0, 2])
        assert args.files == ["--odd", "x"]

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            # The flag that was mistyped, not the required one that is therefore missing.
            (["--dataste", "PACS"], "unknown flag '--dataste'. Did you mean '--dataset'? daft-domainbed fake --help"),
            (["--dataset", "PACS", "--test-envs=0"], "unknown flag '--test-envs'. Did you mean '--test_envs'?"),
            (["--dataset", "PACS", "-steps", "3"], "unknown flag '-steps'. Did you mean '--steps'?"),
            (["--dataset", "PACS", "--step", "3"], "unknown flag '--step'. Did you mean '--steps'?"),
            (["--dataset", "PAC"], "--dataset: unknown value 'PAC'. Did you mean 'PACS'? It takes: PACS, VLCS"),
            (["--dataset", "PACS", "--steps", "0"], "--steps: '0' is not a whole number of at least 1"),
            (["--dataset", "PACS", "--steps", "1.5"], "--steps: '1.5' is not a whole number of at least 1"),
            (["--dataset", "PACS", "--test_envs", "x"], "--test_envs: 'x' is not a whole number of at least 0"),
            (["--dataset", "PACS", "--steps"], "--steps: expected one argument"),
            (["--dataset", "PACS", "--shift", "far"], "--shift: invalid float value: 'far'"),
            ([], "the following arguments are required: --dataset"),
        ],
    )
    def test_mistake_is_named_with_the_nearest(self, argv: list[str], message: str) -> None:
        with pytest.raises(UsageError) as refusal:
            build_parser().parse_args(argv)
        assert str(refusal.value).startswith(message)

    def test_unexpected_argument(self) -> None:
        parser = ArgumentParser(prog="daft-domainbed fake")
        with pytest.raises(UsageError, match="unexpected argument 'PACS': daft-domainbed fake --help"):
            parser.parse_args(["PACS"])

    def test_arguments_of_another_program_are_left_alone(self) -> None:
        parser = ArgumentParser(prog="daft-domainbed fake")
        parser.add_argument("module")
        parser.add_argument("rest", nargs=argparse.REMAINDER)
        assert parser.parse_args(["train", "--odd", "1"]).rest == ["--odd", "1"]

    def test_sub_commands_answer_alike(self) -> None:
        parser = ArgumentParser(prog="daft-domainbed fake")
        launch = parser.add_subparsers(dest="action", required=True).add_parser("launch")
        launch.add_argument("--n_trials", type=positive_int)
        assert parser.parse_args(["launch", "--n_trials", "2"]).n_trials == 2
        with pytest.raises(UsageError, match="unknown flag '--n_trial'. Did you mean '--n_trials'?"):
            parser.parse_args(["launch", "--n_trial", "2"])
        with pytest.raises(UsageError, match="unknown value 'lanch'. Did you mean 'launch'?"):
            parser.parse_args(["lanch"])

    def test_help_shows_description_and_examples_as_written(self) -> None:
        text = build_parser().format_help()
        assert "Do it.\n\nAt length." in text
        assert "examples:\n  daft-domainbed fake\n" in text
        assert "--debug" in text


class TestNumbers:
    @given(st.integers(min_value=0, max_value=10**12))
    def test_whole_numbers_are_read_back(self, value: int) -> None:
        assert non_negative_int(str(value)) == value
        assert positive_int(str(value + 1)) == value + 1

    @given(st.integers(max_value=0))
    def test_whole_numbers_below_the_bound_are_refused(self, value: int) -> None:
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{value}' is not a whole number of at least 1"):
            positive_int(str(value))
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{value - 1}' is not a whole number of at least 0"):
            non_negative_int(str(value - 1))

    @given(st.floats())
    def test_fraction_takes_what_is_at_least_0_and_below_1(self, value: float) -> None:
        if 0 <= value < 1:
            assert fraction(repr(value)) == value
        else:
            with pytest.raises(argparse.ArgumentTypeError, match="is not a fraction of at least 0 and below 1"):
                fraction(repr(value))
