"""The comparisons of related systems, from their records to docs/methods.md, byte for byte as committed.

python -m tools.related pack runs/related     collect the records of finished runs, without weights, into the archive
python -m tools.related write                 read sweeps/related/records.tar.xz, write docs/methods.md
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import jinja2

from daft_domainbed.results.comparison import FEWEST_TRIALS
from daft_domainbed.results.statistics import bootstrap_mean, flip_signs, standard_error
from daft_domainbed.runtime.layout import DONE_FILE, RECORDS_FILE, list_teachers, read_first_record, read_last_record
from tools.archives import open_archive, write_archive
from tools.measure_related import MEASURES_FILE
from tools.ranking import LIST_MEASURES
from tools.study import make_table

REPOSITORY = Path(__file__).resolve().parents[1]
STUDY = REPOSITORY / "sweeps" / "related"
RECORDS = STUDY / "records.tar.xz"
TEMPLATE = "methods.md.j2"
PAGE = REPOSITORY / "docs" / "methods.md"

Measures = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """What is known of a finished and measured run."""

    measures: Measures
    first: Measures
    last: Measures

    @property
    def key(self) -> tuple[int, int]:
        """Its trial and its held-out domain."""
        return self.measures["trial"], self.measures["env"]

    @property
    def updates(self) -> int:
        """Its own, and those of all that had to be trained before."""
        return int(self.last["step"]) + 1 + sum(_count_updates(facts) for facts in list_teachers(self.first).values())


def _count_updates(facts: Mapping[str, Any]) -> int:
    own = int(facts.get("steps") or 0) if facts.get("algorithm") else 0
    return own + sum(_count_updates(its) for its in list_teachers(facts).values())


# --- what is asked -----------------------------------------------------------------------------------------------


def share(name: str, of: str = "n") -> Callable[[Measures], float]:
    """Return what reads the percentage of images that are counted under a name."""
    return lambda measures: 100 * sum(measures[name]) / sum(measures[of])


def share_worst(name: str) -> Callable[[Measures], float]:
    """Return what reads the same of the class where it is least."""
    return lambda measures: min(100 * a / b for a, b in zip(measures[name], measures["n"], strict=True) if b)


def share_at(value: str, name: str) -> Callable[[Measures], float]:
    """Return what reads the percentage of images at a lambda."""
    return lambda measures: 100 * sum(measures["lambdas"][value][name]) / sum(measures["n"])


def read_outside(name: str, radius: str) -> Callable[[Measures], float]:
    """Return what reads an AUROC in percent."""
    return lambda measures: 100 * measures["outside"][name][radius]["auroc"]


def read_fidelity(name: str, factor: float = 1) -> Callable[[Measures], float]:
    """Return what reads a measure of fidelity."""
    return lambda measures: factor * measures["fidelity"][name]


CLEAN, PGD = share("clean"), share("linf_pgd20")
ATTACKED = {
    "PGD-50, 5 starts": share("linf_pgd50x5", "n_attacked"),
    "PGD-50 in L2 0.5": share("l2_pgd50x3", "n_attacked"),
    "Square": share("linf_square", "n_attacked"),
}


@dataclass(frozen=True)
class Comparison:
    """Rows that are compared by some measures.

    Attributes:
        rows: By title, a sweep's folder below runs/related and the algorithm that counts there.
        measures: By title.
        controls: What every other row is compared with; the first row is compared with every other where none is named.
    """

    rows: Mapping[str, tuple[str, str]]
    measures: Mapping[str, Callable[[Measures], float]]
    controls: tuple[str, ...] = ()

    def list_pairs(self) -> list[tuple[str, str]]:
        """Return which rows are set against which, each two once."""
        first, *others = self.rows
        if not self.controls:
            return [(first, other) for other in others]
        return [
            (row, control)
            for i, control in enumerate(self.controls)
            for row in self.rows
            if row not in self.controls[: i + 1]
        ]


def _make_lambda(value: str) -> Comparison:
    measures = {"clean": share_at(value, "clean"), "PGD-20": share_at(value, "linf_pgd20")}
    return Comparison({"OAT": ("oat/all", "OAT"), "for this lambda alone": (f"oat/lambda_{value}", "OAT")}, measures)


COMPARISONS = {
    "at": Comparison({"AT": ("at/ce", "AT"), "ERM": ("at/ce", "ERM")}, {"clean": CLEAN, "PGD-20": PGD, **ATTACKED}),
    "tintem": Comparison(
        {"TinTeM": ("tintem/sne", "TinTeM"), "KD": ("tintem/sne", "KD"), "Proteus": ("tintem/proteus", "TinTeM")},
        {
            "probe": CLEAN,
            "k-NN": lambda measures: 100 * measures["knn"],
            "agreement": read_fidelity("agreement", 100),
            "KL, nats": read_fidelity("kl"),
            "CKA": read_fidelity("cka"),
            "cosines": read_fidelity("cosines"),
        },
    ),
    "bmtard": Comparison(
        {
            "BMTARD": ("bmtard/both", "BMTARD"),
            "robust teacher alone": ("bmtard/robust_alone", "BMTARD"),
            "clean teacher alone": ("bmtard/clean_alone", "KD"),
            "AT": ("at/ce", "AT"),
        },
        {"clean": CLEAN, "PGD-20": PGD, "mean of both": lambda measures: (CLEAN(measures) + PGD(measures)) / 2},
    ),
    "carot": Comparison(
        {
            "CaRot": ("carot/carot", "CaRot"),
            "FLYP": ("carot/flyp", "CaRot"),
            "fine-tuning": ("carot/fine_tuning", "AFT"),
            "probe, then fine-tuning": ("carot/probe_first", "AFT"),
            "zero-shot": ("carot/teachers", "CLIP"),
        },
        {"accuracy": CLEAN, "calibration error": lambda measures: 100 * measures["ece"]},
    ),
    "faal": Comparison(
        {"FAAL": ("faal", "FAAL"), "AT, its start": ("at/ce", "AT")},
        {"worst class, PGD-20": share_worst("linf_pgd20"), "PGD-20": PGD, "clean": CLEAN},
    ),
    **{f"oat_{value}": _make_lambda(value) for value in ("0", "0.2", "1")},
    "ratio": Comparison(
        {"RATIO": ("ratio", "RATIO"), "AT in L2": ("ratio", "AT")},
        {"clean": CLEAN, "PGD-20 in L2 0.5": share("l2_pgd20")}
        | {
            f"{name}, {'as they are' if radius == '0' else f'L2 {radius}'}": read_outside(name, radius)
            for name in ("digits", "noise", "smooth")
            for radius in ("0", "0.5", "1")
        },
    ),
    "piat": Comparison(
        {
            "PIAT, kl": ("piat/kl", "PIAT"),
            "PIAT, pairwise": ("piat/pairwise", "PIAT"),
            "PIAT, listmle": ("piat/listmle", "PIAT"),
            "adversarial": ("piat/adversarial", "PIAT"),
            "natural": ("piat/natural", "ERM"),
        },
        LIST_MEASURES,
        controls=("natural", "adversarial"),
    ),
    "piat_images": Comparison(
        {
            "TRADES": ("piat/images_trades", "AT"),
            "PIAT, kl": ("piat/images_kl", "PIAT"),
            "PIAT, pairwise": ("piat/images_pairwise", "PIAT"),
            "PIAT, listmle": ("piat/images_listmle", "PIAT"),
            "natural": ("piat/images_natural", "ERM"),
        },
        {"clean": CLEAN, "PGD-20": PGD},
        controls=("TRADES", "natural"),
    ),
    "adt": Comparison({"ADT": ("adt", "ADT"), "AT": ("at/ce", "AT")}, {"clean": CLEAN, "PGD-20": PGD, **ATTACKED}),
}


# --- tables ------------------------------------------------------------------------------------------------------


class Study:
    """All runs below a folder.

    Args:
        root: Of the unpacked records.
    """

    def __init__(self, root: Path) -> None:
        self.runs: dict[tuple[str, str], list[Run]] = defaultdict(list)
        for path in sorted(root.rglob(MEASURES_FILE)):
            run = Run(json.loads(path.read_text()), read_first_record(path.parent), read_last_record(path.parent))
            sweep = path.parents[1].relative_to(root).as_posix()
            self.runs[sweep, run.measures["algorithm"]].append(run)

    def show(self, name: str) -> str:
        """Return a comparison's tables: what each row is, and what separates the first one from the others."""
        comparison = COMPARISONS[name]
        runs = {title: {run.key: run for run in self.runs.get(place, ())} for title, place in comparison.rows.items()}
        missing = [title for title, found in runs.items() if not found]
        if missing:
            return f"Not run yet: {', '.join(missing)}."
        keys = choose_keys(set.intersection(*(set(found) for found in runs.values())))
        if not keys:
            return "Not run yet: no trial that all rows have."
        kept = {title: [found[key] for key in keys] for title, found in runs.items()}
        trials = sorted({trial for trial, _ in keys})
        measures = comparison.measures.items()
        values = {title: {name: _by_trial(found, read) for name, read in measures} for title, found in kept.items()}
        rows = []
        for title, found in kept.items():
            cells = [_show_mean(numbers) for numbers in values[title].values()]
            seconds = median(run.last["seconds"] for run in found)
            rows.append([title, *cells, f"{found[0].updates:,}", f"{seconds:.0f}"])
        pairs = comparison.list_pairs()
        gains = [
            [name, *(_show_gain(values[one][name], values[other][name]) for one, other in pairs)]
            for name in comparison.measures
        ]
        n_domains = len(keys) // len(trials)
        n = f"n = {len(trials)} trials of {n_domains} held-out domain{'s' * (n_domains > 1)}"
        return "\n\n".join(
            [
                f"{n}; mean ± standard error over trials.",
                make_table(["", *comparison.measures, "updates", "seconds"], rows),
                f"Differences{_name_interval(len(trials))}, p:",
                make_table(["", *(f"{one} - {other}" for one, other in pairs)], gains),
            ]
        )

    def show_proof(self) -> str:
        """Return when each sweep's runs began, by which commit and on what."""
        rows = []
        for (sweep, algorithm), runs in sorted(self.runs.items()):
            starts = sorted(str(run.first["started"]) for run in runs)
            machines = Counter((str(run.first["machine"]["commit"]), run.first["machine"]["torch"]) for run in runs)
            shown = ", ".join(f"{commit}, torch {torch} ({n})" for (commit, torch), n in sorted(machines.items()))
            rows.append([f"`{sweep}`", algorithm, str(len(runs)), starts[0][:16], starts[-1][:16], shown])
        return make_table(["sweep", "", "runs", "first began", "last began", "commit (runs)"], rows)


def choose_keys(keys: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return pairs of trial and domain with as many domains for every trial, of those that have most in all.

    Example:
        >>> choose_keys([(0, 0), (0, 1), (1, 0), (1, 2), (2, 3)])
        [(0, 0), (0, 1), (1, 0), (1, 2)]
    """
    domains: dict[int, list[int]] = defaultdict(list)
    for trial, env in sorted(keys):
        domains[trial].append(env)
    best: list[tuple[int, int]] = []
    for n in range(1, 1 + max(map(len, domains.values()), default=0)):
        kept = [(trial, env) for trial, envs in domains.items() if len(envs) >= n for env in envs[:n]]
        best = kept if len(kept) >= len(best) else best
    return best


def _by_trial(runs: Sequence[Run], read: Callable[[Measures], float]) -> list[float]:
    """Return the mean over held-out domains, by trial: domains of one trial share their source images."""
    values: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        values[run.key[0]].append(read(run.measures))
    return [fmean(values[trial]) for trial in sorted(values)]


def _show_mean(values: Sequence[float]) -> str:
    error = standard_error(values)
    return f"{fmean(values):.2f}" + ("" if error is None else f" ± {error:.2f}")


def _show_gain(one: Sequence[float], other: Sequence[float]) -> str:
    gains = [a - b for a, b in zip(one, other, strict=True)]
    interval = "" if (found := find_interval(gains)) is None else f" [{found[0]:+.2f}, {found[1]:+.2f}]"
    return f"{fmean(gains):+.2f}{interval}" + (f", {flip_signs(gains):.3f}" if len(gains) > 1 else "")


def find_interval(gains: Sequence[float]) -> tuple[float, float] | None:
    """Return the interval of a mean paired difference, from six trials on the bootstrap's; None of fewer than five.

    Of five trials it reaches from the smallest difference to the largest: what lies outside, sign flips refuse with
    p = 2 / 32, and what lies inside they do not, so that it holds at 93.75 %, whatever the spread.

    Example:
        >>> find_interval([1.0, 3.0, 2.0, 5.0, 4.0])
        (1.0, 5.0)
        >>> find_interval([1.0, 3.0, 2.0, 5.0]) is None
        True
    """
    if len(gains) == FEWEST_TRIALS - 1:
        return min(gains), max(gains)
    return bootstrap_mean(gains) if len(gains) >= FEWEST_TRIALS else None


def _name_interval(n_trials: int) -> str:
    if n_trials >= FEWEST_TRIALS:
        return " [95 % interval]"
    return " [93.75 % interval]" if n_trials == FEWEST_TRIALS - 1 else ""


# --- files -------------------------------------------------------------------------------------------------------


def pack(runs: Path, archive: Path) -> int:
    """Write the records of finished and measured runs into an archive, the same bytes for the same records."""
    folders = [path.parent for path in runs.rglob(MEASURES_FILE) if (path.parent / DONE_FILE).is_file()]
    files = [folder / name for folder in folders for name in (RECORDS_FILE, MEASURES_FILE, DONE_FILE)]
    write_archive({file.relative_to(runs).as_posix(): file.read_bytes() for file in files}, archive)
    return len(folders)


def render(archive: Path) -> str:
    """Return the page that an archive's records make; with none, the page that says so."""
    with open_archive(archive) if archive.is_file() else tempfile.TemporaryDirectory() as folder:
        study = Study(Path(folder))
    loader = jinja2.FileSystemLoader(STUDY)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.get_template(TEMPLATE).render(compare=study.show, proof=study.show_proof())


def main(argv: Sequence[str] | None = None) -> int:
    """Pack, or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("write")
    commands.add_parser("pack").add_argument("runs", type=Path)
    args = parser.parse_args(argv)
    if args.command == "pack":
        print(f"{RECORDS}: {pack(args.runs, RECORDS)} runs")
    else:
        PAGE.write_text(render(RECORDS), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
