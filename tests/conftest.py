"""Whole runs, small enough for a test to afford several, and what is compared of them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import settings

from tests.processes import WarmPopen
from tests.states import preserving

# The same examples every time; --hypothesis-profile=random looks for new ones.
settings.register_profile("random", deadline=None)
settings.register_profile("deterministic", deadline=None, derandomize=True)
settings.load_profile("deterministic")

HPARAMS = {"batch_size": 8, "backbone": "resnet8_w2"}
TEACHER_HPARAMS = {"teacher_backbone": "resnet8_w4"}
FLAGS = {"dataset": "Debug28", "steps": 6, "checkpoint_freq": 2, "device": "cpu"}

# What no two runs share: times, and where they lie.
TIMES = {"step_time", "seconds", "mem_gb", "started"}
PLACES = {"output_dir", "teachers_dir", "image_cache", "feature_cache"}


class Tiny:
    """Trains tiny networks on noise, in the folders below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def make_flags(self, folder: str = "run", hparams: dict[str, Any] | None = None, **flags: Any) -> dict[str, Any]:
        """Return the flags of a run by name; a flag of None is left out, `hparams` are added to the tiny ones."""
        tiny = HPARAMS | TEACHER_HPARAMS if flags.get("algorithm") in ("AFT", "KD", "DAFT") else HPARAMS
        given = {**FLAGS, "output_dir": str(self.root / folder), "hparams": json.dumps(tiny | (hparams or {}))}
        return {name: value for name, value in {**given, **flags}.items() if value is not None}

    def make_argv(self, *args: Any, **flags: Any) -> list[str]:
        """Return the same as a command line."""
        argv = []
        for name, value in self.make_flags(*args, **flags).items():
            values = value if isinstance(value, list) else [] if value is True else [value]
            argv += [f"--{name}", *map(str, values)]
        return argv

    def train(self, *args: Any, on_step: Callable[[int, int], None] | None = None, **flags: Any) -> Path:
        """Run or go on with a run in this process."""
        from daft_domainbed.arguments import TrainArgs
        from daft_domainbed.training.engine import train

        return train(TrainArgs(**self.make_flags(*args, **flags)), quiet=True, on_step=on_step)

    def make_teacher(self, algorithm: str = "ERM", folder: str | None = None, **flags: Any) -> Path:
        """Train a model as a teacher of its own, and return its checkpoint."""
        backbone = {"backbone": "resnet8_w4"} if algorithm == "ERM" else {}
        return self.train(folder or algorithm, backbone, algorithm=algorithm, **flags) / "model.pkl"


class Stopped(BaseException):
    """Stands for a kill: nothing in the package catches it."""


def stop_after(last: int | None) -> Callable[[int, int], None]:
    """Return what stops a run once it has taken so many steps; None lets it end."""

    def on_step(step: int, n_steps: int) -> None:
        if step == last:
            raise Stopped

    return on_step


class Shelf:
    """Runs as `Tiny` trains them, each trained once and never written to: whole, or stopped after some steps."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.roots: dict[str, Path] = {}

    def get_root(self, hparams: dict[str, Any] | None = None, stop_at: int | None = None, **flags: Any) -> Path:
        """Return the folder that the run `run` and its teachers are in."""
        key = repr((hparams, stop_at, sorted(flags.items())))
        if key not in self.roots:
            self.roots[key] = self.root / str(len(self.roots))
            with preserving(), suppress(Stopped):
                Tiny(self.roots[key]).train("run", hparams, on_step=stop_after(stop_at), **flags)
        return self.roots[key]

    def get(self, *args: Any, **flags: Any) -> Path:
        """Return the run's own folder."""
        return self.get_root(*args, **flags) / "run"

    def read(self, *args: Any, **flags: Any) -> dict[str, str]:
        """Return the outcome of the run and its teachers."""
        return read_outcome(self.get_root(*args, **flags))

    def copy(self, target: Path, *args: Any, **flags: Any) -> Path:
        """Copy the run to a folder that may be written to, and return it."""
        return Path(shutil.copytree(self.get(*args, **flags), target))


def get_defaults(host: Any, algorithm: str, dataset: str, user: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return an algorithm's default hyperparameters on a data set."""
    from daft_domainbed.host.contract import describe_dataset
    from daft_domainbed.plugin.defaults import get_default_hparams

    return get_default_hparams(host, algorithm, describe_dataset(host, dataset, user or {}))


def read_records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def strip_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: strip_times(item) for key, item in value.items() if key not in TIMES | PLACES}
    return [strip_times(item) for item in value] if isinstance(value, list) else value


def read_outcome(root: Path) -> dict[str, str]:
    """Return all that should be equal of two folders of runs: files, records without times, weights bit for bit.

    Each file is a short text, so that a failing comparison stays readable.
    """
    from daft_domainbed.host import checkpoints
    from daft_domainbed.models import weights

    outcome: dict[str, str] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        outcome[name] = "there"
        if path.name == "results.jsonl":
            for i, record in enumerate(map(strip_times, read_records(path.parent))):
                text = json.dumps(record, sort_keys=True)
                outcome[f"{name}:{i}"] = f"step {record['step']}, loss {record.get('loss')!r}, {hash_text(text)}"
        elif path.suffix == ".pkl":
            content = checkpoints.load_checkpoint(path)
            hparams = json.dumps(content["model_hparams"], sort_keys=True)
            state = weights.hash_state(content["model_dict"])
            outcome[name] = f"step {content['step']}, weights {state[:16]}, hparams {hash_text(hparams)}"
    return outcome


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Hostile:
    """Runs code when it is unpickled: it makes the file `sentinel`, in one of several ways."""

    WAYS: ClassVar[dict[str, Callable[[Path], tuple[Any, ...]]]] = {
        "system": lambda sentinel: (os.system, (f"touch {sentinel}",)),
        "subprocess": lambda sentinel: (subprocess.check_call, (["touch", str(sentinel)],)),
        "eval": lambda sentinel: (eval, (f"open({str(sentinel)!r}, 'w')",)),
        "exec": lambda sentinel: (exec, (f"open({str(sentinel)!r}, 'w')",)),
        "open": lambda sentinel: (open, (str(sentinel), "w")),
        "method": lambda sentinel: (Path.touch, (sentinel,)),
    }

    def __init__(self, way: str, sentinel: Path) -> None:
        self.call = self.WAYS[way](sentinel)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def copy_with_pickle(source: Path, target: Path, content: bytes) -> None:
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as copy:
        for name in archive.namelist():
            copy.writestr(name, content if name.endswith("/data.pkl") else archive.read(name))


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    """Trains tiny networks below the test's own folder."""
    return Tiny(tmp_path)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """Runs that nothing disturbed."""
    return Shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An ERM and an AFT checkpoint on Debug28, environment 0 held out; not to be written to."""
    made = Tiny(tmp_path_factory.mktemp("teachers"))
    paths = {"ERM": made.make_teacher("ERM")}
    paths["AFT"] = made.train("AFT", {"teacher": str(paths["ERM"])}, algorithm="AFT") / "model.pkl"
    return paths


@pytest.fixture(params=sorted(Hostile.WAYS))
def hostile(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hostile]:
    """Something that must never be unpickled, in every way that there is; the test fails where it was."""
    sentinel = tmp_path / "sentinel"
    yield Hostile(request.param, sentinel)
    assert not sentinel.exists()


@pytest.fixture
def every_hostile(tmp_path: Path) -> Iterator[list[Hostile]]:
    """All of them; the test fails where one was unpickled."""
    sentinel = tmp_path / "sentinel"
    yield [Hostile(way, sentinel) for way in sorted(Hostile.WAYS)]
    assert not sentinel.exists()


@pytest.fixture
def replace_pickle() -> Callable[[Path, Path, bytes], None]:
    """Copies a checkpoint with another pickle in it, around the same tensors; the archive is whole."""
    return copy_with_pickle


@pytest.fixture(scope="module")
def few_lists() -> Iterator[None]:
    """Has `DocRanking` twenty lists a package, of which four are attacked for the records."""
    from daft_domainbed.embedded import documents
    from daft_domainbed.training import lists

    def load_few(package: str, load: Callable[[str], Any] = documents.load_package) -> Any:
        whole = load(package)
        return documents.ListsDomain(whole.queries[:20], whole.documents, whole.candidates[:20], whole.places[:20])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "load_package", load_few)
        patch.setattr(lists, "N_ATTACKED", 4)
        yield


FOLDER_HPARAMS = {"input_size": 16, "batch_size": 4}


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Three domains of two classes of five small pictures each, for runs with `FOLDER_HPARAMS`."""
    from PIL import Image

    folder = tmp_path / "pictures"
    for i in range(30):
        place = folder / "abc"[i % 3] / "xy"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (8 * i, 255 - 8 * i, 100)).save(place / f"{i}.png")
    return folder


@pytest.fixture
def gather_facts(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Returns the facts that a run with these flags gives to its algorithm, of which nothing is trained."""
    from daft_domainbed.training import engine

    class Gathered(Exception):
        pass

    def gather(**flags: Any) -> Any:
        gathered: list[Any] = []

        def stop(facts: Any, make: object) -> None:
            gathered.append(facts)
            raise Gathered

        with monkeypatch.context() as patch, pytest.raises(Gathered):
            patch.setattr(engine, "find_teachers", stop)
            tiny.train(**{"algorithm": "KD", **flags})
        return gathered[0]

    return gather


@pytest.fixture
def records() -> Callable[[Path], list[dict[str, Any]]]:
    """Reads the records of a run."""
    return read_records


@pytest.fixture
def outcome() -> Callable[[Path], dict[str, str]]:
    """Reads all that should be equal of two folders of runs."""
    return read_outcome


@pytest.fixture
def run_train(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    """Runs `daft-domainbed train` in this process; returns its exit status and the lines of its standard error."""
    from daft_domainbed.cli import run_command

    def run(argv: list[str]) -> tuple[int, list[str]]:
        capfd.readouterr()
        status = run_command("train", argv)
        return status, capfd.readouterr().err.splitlines()

    return run


@pytest.fixture
def warm_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the local launcher's server of jobs the import of torch."""
    from daft_domainbed.launch import fork_server

    monkeypatch.setattr(fork_server, "Popen", WarmPopen)


@pytest.fixture
def start_script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., WarmPopen]]:
    """Runs a script in a process of its own, as `WarmPopen` does; it ends with the test."""
    folder = tmp_path_factory.mktemp("scripts")
    started: list[WarmPopen] = []

    def start(code: str, **options: Any) -> WarmPopen:
        path = folder / f"{len(started)}.py"
        path.write_text(code)
        started.append(WarmPopen([sys.executable, path], **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of a megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("a disk of its own can only be mounted by root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)
