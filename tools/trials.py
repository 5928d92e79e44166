"""Run sweeps trial by trial, all of them on one trial before the next, and keep each trial's records.

python -m tools.trials sweeps/laptop sweeps/laptop/sweep.yaml --trials 100 101
python -m tools.trials STUDY FILE... --trials 0 24 --n_jobs 2 --teachers STORE --commit

An interruption costs one trial at most: the same command goes on. After each trial its records, without weights, are
packed into STUDY/records/trial_N.tar.xz, committed where that is asked, and the cache of features is emptied, since
another trial's views are others. With --teachers, a store's teachers of the trial are measured. A sweep whose file ends
before a trial (`n_trials`) has no part in it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from daft_domainbed.errors import RunError
from daft_domainbed.runtime.layout import DONE_FILE, RECORDS_FILE, TEACHERS_FOLDER, read_first_record
from daft_domainbed.scripts.sweep import read_config
from tools.archives import write_archive

COSTS, MEASURES = "costs.json", "teachers.jsonl"


def run_trial(study: Path, files: Sequence[Path], trial: int, n_jobs: int, store: Path | None = None) -> Path:
    """Run what sweeps have on a trial, and pack its records; return the archive.

    Args:
        study: The folder whose `records` keeps them.
        files: Of the sweeps, in the order in which they are run.
        trial: Its seed.
        n_jobs: Jobs at a time.
        store: Of teachers that are measured; see `tools.measure_teachers`.

    Raises:
        RunError: A sweep failed; the others were not begun.
    """
    sweeps = {path: read_config(path, "launch") for path in files}
    sweeps = {
        path: given for path, given in sweeps.items() if given.get("n_trials_from", 0) <= trial < given["n_trials"]
    }
    costs = []
    for path, given in sweeps.items():
        began = time.monotonic()
        command = [sys.executable, "-m", "daft_domainbed.scripts.sweep", "launch", "--config", str(path)]
        command += ["--n_trials", str(trial + 1), "--n_jobs", str(n_jobs), "--skip_confirmation"]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise RunError(f"{path}, trial {trial}: the sweep failed; give the same command again to go on")
        cache = Path(given["feature_cache"]) if "feature_cache" in given else None
        seconds = round(time.monotonic() - began, 1)  # of this call; an interrupted one's are lost
        costs.append({"sweep": path.stem, "seconds": seconds, "cache": list(read_cache(cache))})
    runs = [folder for given in sweeps.values() for folder in list_runs(given, trial)]
    archive = study / "records" / f"trial_{trial}.tar.xz"
    texts = {COSTS: json.dumps({"load": os.getloadavg()[0], "sweeps": costs}, indent=1) + "\n"}
    if store is not None:
        command = [sys.executable, "-m", "tools.measure_teachers", str(store), "--trial", str(trial)]
        command += [
            f"--feature_cache={given['feature_cache']}" for given in [*sweeps.values()][:1] if "feature_cache" in given
        ]
        texts[MEASURES] = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    pack(runs, texts, archive)
    for given in sweeps.values():
        if "feature_cache" in given:
            shutil.rmtree(given["feature_cache"], ignore_errors=True)
    return archive


def read_cache(folder: Path | None) -> Iterator[dict[str, Any]]:
    """Yield, of each file of a cache of features: rows, bytes of a row and of the file."""
    for path in sorted(folder.glob("*.sqlite")) if folder else []:
        with closing(sqlite3.connect(path)) as database:
            rows, width, dtype = database.execute(
                "SELECT COUNT(*), MAX(LENGTH(row)), MAX(dtype) FROM features"
            ).fetchone()
        yield {"rows": rows, "row_bytes": width, "dtype": dtype, "bytes": path.stat().st_size}


def list_runs(given: Mapping[str, Any], trial: int) -> list[Path]:
    """Return the folders of a sweep's runs on a trial, teachers included.

    Raises:
        RunError: One is not done.
    """
    root = Path(given["output_dir"])
    stores = {root / TEACHERS_FOLDER, Path(given.get("teachers_dir") or root / TEACHERS_FOLDER)}
    folders = [path.parent for place in (root, *stores) for path in sorted(place.glob(f"*/{RECORDS_FILE}"))]
    folders = [folder for folder in folders if read_first_record(folder)["args"]["trial_seed"] == trial]
    if unfinished := [folder for folder in folders if not (folder / DONE_FILE).is_file()]:
        raise RunError(f"{unfinished[0]} is not done: give the same command again to go on")
    return folders


def pack(folders: Sequence[Path], texts: Mapping[str, str], archive: Path) -> None:
    """Pack records into an archive whose bytes depend on nothing else.

    Args:
        folders: Of runs; each is packed as the last two parts of its path, `sweep/run` or `teachers/run`.
        texts: Further files by name.
        archive: To be written.
    """
    files = {f"{folder.parent.name}/{folder.name}/{RECORDS_FILE}": folder / RECORDS_FILE for folder in folders}
    contents = {name: path.read_bytes() for name, path in files.items()}
    contents |= {name: text.encode() for name, text in texts.items()}
    write_archive(contents, archive)


def commit(archive: Path, trial: int) -> None:
    """Commit a trial's records in the clone that the study runs from."""
    for command in (["add", str(archive)], ["commit", "--quiet", "-m", f"Records of trial {trial}", str(archive)]):
        subprocess.run(["git", *command], check=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run trials that have no records yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--trials", type=int, nargs=2, required=True, metavar=("FIRST", "END"))
    parser.add_argument("--n_jobs", type=int, default=2)
    parser.add_argument("--teachers", type=Path, metavar="STORE")
    parser.add_argument("--commit", action="store_true")
    args = parser.parse_args(argv)
    for trial in range(*args.trials):
        if not (args.study / "records" / f"trial_{trial}.tar.xz").is_file():
            archive = run_trial(args.study, args.files, trial, args.n_jobs, args.teachers)
            print(f"{archive}: {archive.stat().st_size} bytes", flush=True)
            if args.commit:
                commit(archive, trial)
    return 0


if __name__ == "__main__":
    sys.exit(main())
