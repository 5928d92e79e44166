"""Which records may stand in a study: made once, by code that was committed, after its settings were."""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from daft_domainbed.errors import RunError
from daft_domainbed.runtime.layout import RECORDS_FILE, TEACHERS_FOLDER


class Proof(NamedTuple):
    """A run as its first record proves it: its sweep (or the store of teachers), what was run, and by which commit."""

    archive: Path
    sweep: str
    run: str
    job: tuple[Any, ...]
    commit: str | None


def check_records(archives: Sequence[Path], report: Path) -> None:
    """Make sure that records of a study's report prove what they are for.

    Args:
        archives: What `tools.trials` packed; those without a run of a report sweep are not asked.
        report: The folder of the report's sweep files, inside a clone with its whole history.

    Raises:
        RunError: A record's commit is neither the one that fixed its settings nor a later one of its line, it ends in
            "+" (a changed tree), or a job occurs twice.
    """
    faults = [*list_faults(archives, report)]
    if faults:
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise RunError(f"{faults[0]}{more}")


def list_faults(archives: Sequence[Path], report: Path) -> Iterator[str]:
    """Yield what is wrong with records, one line each; see `check_records`."""
    files = {path.stem: path for path in sorted(report.glob("*.yaml"))}
    seen: dict[tuple[Any, ...], Proof] = {}
    for archive in archives:
        proofs = read_proofs(archive)
        if not any(proof.sweep in files for proof in proofs):
            continue
        for proof in proofs:
            where = f"{proof.archive.name}: {proof.sweep}/{proof.run}"
            if other := seen.get((proof.sweep, *proof.job)):
                yield f"{where} occurs twice, in {other.archive.name} as {other.run}: a job of the report is run once"
            seen[(proof.sweep, *proof.job)] = proof
            if proof.sweep != TEACHERS_FOLDER and proof.sweep not in files:
                yield f"{where}: {report} has no {proof.sweep}.yaml, so that nothing fixed its settings"
                continue
            # A teacher belongs to several sweeps: the first of them may have fixed its settings.
            own = [files[proof.sweep]] if proof.sweep in files else [*files.values()]
            if fault := find_fault(proof.commit, own):
                yield f"{where}: {fault}"


def find_fault(commit: str | None, files: Sequence[Path]) -> str | None:
    """Return why a commit proves nothing of settings that one of some files has, or None."""
    if commit is None:
        return "its record names no commit: run the study from a clone"
    if commit.endswith("+"):
        return f"commit {commit} was run from a changed tree: run the study from a clone of its own"
    folder = files[0].parent
    fixed = [ask(folder, "log", "-1", "--format=%H", "--", str(file)) for file in files]
    if not any(found and is_before(folder, found, commit) for found in fixed):
        short = ", ".join(sorted({found[:7] for found in fixed if found})) or "no commit"
        return f"commit {commit} does not follow the one that fixed its settings ({short})"
    if not is_before(folder, commit, "HEAD"):
        return f"commit {commit} is not of this line: merge the branch that the study ran on"
    return None


@cache
def ask(folder: Path, *command: str) -> str | None:
    """Return what git answers, or None where it fails."""
    answer = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True)
    return None if answer.returncode else answer.stdout.strip()


def is_before(folder: Path, first: str, second: str) -> bool:
    """Return whether a commit is another one, or one of those that it builds on."""
    return ask(folder, "merge-base", "--is-ancestor", first, second) is not None


def read_proofs(archive: Path) -> list[Proof]:
    """Return the runs of an archive that `tools.trials` packed."""
    proofs = []
    with tarfile.open(archive) as tar:
        for member in tar:
            sweep, _, rest = member.name.partition("/")
            content = tar.extractfile(member)
            if not rest.endswith(f"/{RECORDS_FILE}") or content is None:
                continue
            first = json.loads(content.readline())
            args = first["args"]
            run = rest.removesuffix(f"/{RECORDS_FILE}")
            job = (run,) if sweep == TEACHERS_FOLDER else (args["trial_seed"], *args["test_envs"], args["hparams_seed"])
            proofs.append(Proof(archive, sweep, run, job, first.get("machine", {}).get("commit")))
    return proofs
