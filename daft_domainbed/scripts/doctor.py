"""Check this installation and say what is missing, with the command that mends it.

Looks at versions, processor, GPU, both hosts and the data folders. Exit status 0 if the embedded host can run, else 1.

Example:
    daft-domainbed doctor
    daft-domainbed doctor --data_dir data --format json
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import daft_domainbed
from daft_domainbed.cli import ArgumentParser, run_command
from daft_domainbed.errors import UsageError
from daft_domainbed.runtime.machine import count_cores

CORE_PACKAGES = ("torch", "torchvision", "numpy", "safetensors", "pillow", "rich", "jinja2", "pyyaml")
UPSTREAM_PACKAGES = ("wilds", "timm", "tqdm")
UPSTREAM_COMMIT = "b93c22a1cfc3b2428398272c1a116c8de1f4139e"
UPSTREAM_CLONE = "git clone https://github.com/facebookresearch/DomainBed && export DOMAINBED_ROOT=$PWD/DomainBed"

MNIST_FILES = ("train-images", "train-labels", "t10k-images", "t10k-labels")
# Data set: its folder and number of domains as upstream's download script leaves them, and the function that does.
IMAGE_FOLDERS = {
    "VLCS": ("VLCS", 4, "download_vlcs"),
    "PACS": ("PACS", 4, "download_pacs"),
    "OfficeHome": ("office_home", 4, "download_office_home"),
    "TerraIncognita": ("terra_incognita", 4, "download_terra_incognita"),
    "DomainNet": ("domain_net", 6, "download_domain_net"),
}
LEAST_FREE_GIB = 0.5  # a whole `run` with its defaults stays well below


@dataclasses.dataclass(frozen=True)
class Check:
    """One finding.

    Args:
        section: What it belongs to: versions, machine, embedded host, upstream host, data.
        name: What was looked at.
        status: "ok", "missing" or "broken".
        detail: What was found.
        fix: The command that mends it, empty where nothing has to be done.
        essential: The embedded host cannot run without it.
    """

    section: str
    name: str
    status: str
    detail: str
    fix: str = ""
    essential: bool = False


def check_packages(section: str, names: Sequence[str], essential: bool) -> Iterator[Check]:
    """Look up the installed version of each package, without importing it."""
    for name in names:
        try:
            yield Check(section, name, "ok", importlib.metadata.version(name), essential=essential)
        except importlib.metadata.PackageNotFoundError:
            # torch and torchvision are built in pairs: named together, pip chooses a pair.
            wanted = ["torch", "torchvision"] if name in ("torch", "torchvision") else [name]
            yield Check(section, name, "missing", "not installed", _pip_install(*wanted), essential)


def check_torch() -> Iterator[Check]:
    """Check that torchvision's compiled operators load into this torch (only built pairs fit), and look for a GPU."""
    fit = "torch and torchvision fit"
    try:
        import torch
        import torchvision

        kept = torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5).tolist()
        assert kept == [0], f"nms of one box kept {kept}"
    except Exception as error:
        yield Check("versions", fit, "broken", _describe(error), _pip_install("torch", "torchvision"), True)
        return
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    yield Check("versions", fit, "ok", f"built for {built_for}", essential=True)
    yield Check("machine", "torch threads", "ok", str(torch.get_num_threads()))
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        detail = f"{torch.cuda.device_count()} x {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
        yield Check("machine", "GPU", "ok", detail)
    elif Path("/dev/nvidiactl").exists():
        detail = f"there is one that torch {torch.__version__} cannot use: runs take the CPU"
        yield Check("machine", "GPU", "broken", detail, _pip_install("torch", "torchvision"))
    else:
        yield Check("machine", "GPU", "ok", "none: runs take the CPU")
    yield _check_compiler()


def _check_compiler() -> Check:
    from daft_domainbed.data.color_jitter import load_compiled

    if load_compiled():
        return Check("machine", "C compiler", "ok", "images of folders are jittered by compiled code")
    detail = "none that works: images of folders are jittered by torchvision, to the same numbers at half the speed"
    return Check("machine", "C compiler", "missing", detail, "apt install gcc libc6-dev, or your system's")


def check_machine(folder: Path) -> Iterator[Check]:
    """Look at the processor, the memory, and the folder that a run would write to."""
    yield Check("machine", "processor", "ok", f"{platform.machine()}, {count_cores()} cores")
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        yield Check("machine", "memory", "ok", f"{memory / 2**30:.1f} GiB")

    elsewhere = "cd to another folder, or give --output_dir"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"probe")
        yield Check("machine", "folder", "ok", f"{folder} can be written", essential=True)
    except OSError as error:
        yield Check("machine", "folder", "broken", f"{folder}: {error.strerror}", elsewhere, True)
    free = shutil.disk_usage(folder).free / 2**30
    if free >= LEAST_FREE_GIB:
        yield Check("machine", "free disk", "ok", f"{free:.1f} GiB", essential=True)
    else:
        detail = f"{free:.2f} GiB, a run wants {LEAST_FREE_GIB} GiB"
        yield Check("machine", "free disk", "broken", detail, f"free some space, {elsewhere}", True)


def check_embedded() -> Iterator[Check]:
    """Load the embedded host and its images."""
    section = "embedded host"
    fix = _find_reinstallation()
    try:
        from daft_domainbed.host.contract import find_host

        host = find_host("embedded")
        yield Check(section, "modules", "ok", str(Path(host.algorithms.__file__ or "").parent), essential=True)
    except Exception as error:
        yield Check(section, "modules", "broken", _describe(error), fix, True)
        return
    for name in ("EmojiStyles", "ColoredDigits"):
        try:
            hparams = host.hparams_registry.default_hparams("ERM", name)
            environments = list(host.datasets.get_dataset_class(name)("", [0], hparams))
            for environment in environments:
                environment[0]
            images = sum(len(environment) for environment in environments)
            yield Check(section, name, "ok", f"{len(environments)} domains, {images} images", essential=True)
        except Exception as error:
            yield Check(section, name, "broken", _describe(error), fix, True)


def _find_reinstallation() -> str:
    root = Path(daft_domainbed.__file__).parents[1]
    if (root / ".git").exists():
        return f"git -C {shlex.quote(str(root))} status daft_domainbed (git restore brings back what was lost)"
    return "install the package again from where it came: pip install --force-reinstall --no-deps ..."


def check_upstream() -> Iterator[Check]:
    """Look for the user's clone of DomainBed and import it as a run with `--host upstream` would."""
    section = "upstream host"
    root = os.environ.get("DOMAINBED_ROOT")
    if not root and importlib.util.find_spec("domainbed") is None:
        detail = "DOMAINBED_ROOT is not set and domainbed is not on the import path; only --host upstream needs it"
        yield Check(section, "clone", "missing", detail, UPSTREAM_CLONE)
        return
    packages = list(check_packages(section, UPSTREAM_PACKAGES, essential=False))
    yield from packages
    try:
        from daft_domainbed.host.contract import find_host

        host = find_host("upstream")
    except Exception as error:
        missing = [package.name for package in packages if package.status != "ok"]
        yield Check(section, "clone", "broken", _describe(error), _pip_install(*missing) if missing else UPSTREAM_CLONE)
        return
    clone = Path(host.algorithms.__file__ or "").parents[1]
    yield Check(section, "clone", "ok", f"{clone}, {_describe_commit(clone)}")


def _describe_commit(clone: Path) -> str:
    git = ["git", "-C", str(clone), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"commit unknown (written for {UPSTREAM_COMMIT[:7]})"
    return f"commit {commit[:7]}" + ("" if commit == UPSTREAM_COMMIT else f" (written for {UPSTREAM_COMMIT[:7]})")


def check_data(data_dir: Path) -> Iterator[Check]:
    """Look for DomainBed's data sets, in the folders that its download script makes."""
    data_dir = data_dir.resolve()
    folder = json.dumps(str(data_dir))
    raw = data_dir / "MNIST" / "raw"
    absent = [name for name in MNIST_FILES if not list(raw.glob(f"{name}-idx*-ubyte"))]
    if absent:
        fix = _python(f"from torchvision.datasets import MNIST; MNIST({folder}, download=True)")
        yield Check("data", "RotatedMNIST, ColoredMNIST", "missing", f"{raw} has no {', '.join(absent)}", fix)
    else:
        yield Check("data", "RotatedMNIST, ColoredMNIST", "ok", str(raw))
    for name, (subfolder, count, function) in IMAGE_FOLDERS.items():
        status, detail = _look_into(data_dir / subfolder, count)
        download = _python(f"from domainbed.scripts.download import {function}; {function}({folder})")
        fix = f"{_pip_install('gdown', 'wilds')} && cd $DOMAINBED_ROOT && {download}"
        yield Check("data", name, status, detail, "" if status == "ok" else fix)


def _look_into(folder: Path, count: int) -> tuple[str, str]:
    """Return the status of a folder of domains, and what it holds."""
    from daft_domainbed.embedded.image_folder import list_folders

    if not folder.is_dir():
        return "missing", f"no folder {folder}"
    domains = {name: set(list_folders(folder / name)) for name in list_folders(folder)}
    if len(domains) != count:
        return "broken", f"{folder} has {len(domains)} domains where {count} belong: {', '.join(sorted(domains))}"
    every = set().union(*domains.values())
    for domain, classes in sorted(domains.items()):
        if lacking := sorted(every - classes):
            return "broken", f"{folder / domain} lacks the class {lacking[0]!r} ({len(lacking)} in all)"
    return "ok", f"{folder}, {count} domains, {len(every)} classes"


def _python(code: str) -> str:
    return f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}"


def _pip_install(*arguments: str) -> str:
    return f"{shlex.quote(sys.executable)} -m pip install --upgrade {' '.join(arguments)}"


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def examine(data_dir: str | None = None) -> list[Check]:
    """Make every check.

    Args:
        data_dir: Where DomainBed's data sets are looked for; not looked for if None.

    Raises:
        UsageError: `data_dir` is no folder.
    """
    if data_dir is not None and not Path(data_dir).is_dir():
        raise UsageError(f"--data_dir {data_dir!r} is not a folder: give the one that holds PACS, VLCS, MNIST ...")
    versions = [
        Check("versions", "python", "ok", f"{platform.python_version()} at {sys.executable}"),
        Check("versions", "daft_domainbed", "ok", daft_domainbed.__version__),
        *check_packages("versions", CORE_PACKAGES, essential=True),
        *check_torch(),
    ]
    # Without its packages the host fails for a reason that is already told, with the command that mends it.
    hosts = [] if find_essential_problems(versions) else [*check_embedded(), *check_upstream()]
    data = list(check_data(Path(data_dir))) if data_dir is not None else []
    return [*versions, *check_machine(Path.cwd()), *hosts, *data]


def format_text(checks: Sequence[Check]) -> str:
    """Return the findings for a reader, a line each, with the mending command under what needs one."""
    lines: list[str] = []
    section = ""
    for check in checks:
        if check.section != section:
            section = check.section
            lines += ([""] if lines else []) + [section]
        lines.append(f"  {check.status:<8} {check.name}: {check.detail}")
        if check.fix:
            lines.append(f"  {'':<8} -> {check.fix}")
    broken = find_essential_problems(checks)
    verdict = f"To mend first: {', '.join(check.name for check in broken)}." if broken else "The embedded host can run."
    return "\n".join([*lines, "", verdict])


def find_essential_problems(checks: Sequence[Check]) -> list[Check]:
    """Return what keeps the embedded host from running."""
    return [check for check in checks if check.essential and check.status != "ok"]


def build_parser() -> ArgumentParser:
    """Return the parser of this command."""
    parser = ArgumentParser(prog="daft-domainbed doctor", doc=__doc__)
    parser.add_argument("--data_dir", metavar="DIR", help="also look for DomainBed's data sets in this folder")
    parser.add_argument("--format", choices=["text", "json"], default="text", help="default: text")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings on standard output."""
    args = build_parser().parse_args(argv)
    checks = examine(args.data_dir)
    problems = find_essential_problems(checks)
    if args.format == "json":
        findings = [dataclasses.asdict(check) for check in checks]
        print(json.dumps({"schema": 1, "ok": not problems, "checks": findings}, indent=2))
    else:
        print(format_text(checks))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(run_command("doctor"))
