"""The protocol: which checkpoints are asked what, in which order, and where the answers are kept.

Every answer goes into the journal of its model as soon as it is there, so that a killed evaluation goes on. The
protocol is ARES-Bench's (Liu et al., 2023, arXiv 2302.14301), on the user's own data and classes.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from daft_domainbed.errors import RunError, UsageError
from daft_domainbed.evaluation import whole
from daft_domainbed.evaluation.autoattack import check_autoattack
from daft_domainbed.evaluation.card import format_card
from daft_domainbed.evaluation.journal import open_journal
from daft_domainbed.evaluation.memory import is_out_of_memory
from daft_domainbed.evaluation.outside import Outside, find_outside
from daft_domainbed.evaluation.progress import Progress
from daft_domainbed.evaluation.record import Findings, Protocol, build_record, name_finding
from daft_domainbed.evaluation.subject import Subject, load_subject
from daft_domainbed.evaluation.suites import NORMS, SUITES, get_eps, get_grid
from daft_domainbed.evaluation.tasks import Radius, Task, list_tasks
from daft_domainbed.evaluation.teachers import find_teachers
from daft_domainbed.functional.attacks import Norm
from daft_domainbed.runtime import stopping
from daft_domainbed.runtime.files import write_text
from daft_domainbed.runtime.layout import DONE_FILE, EVALUATION_FILE, EVALUATION_FOLDER
from daft_domainbed.runtime.machine import describe_machine, find_device, measure_peak_memory
from daft_domainbed.runtime.randomness import preserve_states

CARD_FILE, EXAMPLES_FILE = "evaluation.md", "examples.json"


@dataclass(frozen=True)
class EvaluateArgs:
    """The arguments of an evaluation.

    Attributes:
        checkpoints: Files `model.pkl`, as they were given.
        output_dir: `evaluation/` beside the checkpoint, unless given.
        n_examples: Of an environment at most; 0 is all, None the suite's own number.
        ood: Sets of outside images; noise, where the suite asks and nothing is given.
        norm: In which radii are measured.
        eps: The fixed radius, of the only norm.
    """

    checkpoints: Sequence[str]
    output_dir: str | None = None
    suite: str = "quick"
    n_examples: int | None = None
    seed: int = 0
    data_dir: str | None = None
    ood: Sequence[str] = field(default_factory=list)
    norm: Sequence[Norm] = NORMS
    eps: float | None = None
    host: str | None = None
    device: str = "auto"


def evaluate(args: EvaluateArgs, *, on_step: Callable[[int, int], None] | None = None) -> list[dict[str, Any]]:
    """Evaluate checkpoints, or go on with it, or return what is stored.

    Args:
        args: What to evaluate.
        on_step: Told after each answer how many there are, and of how many, in the place of lines on standard error.

    Returns:
        One json a model, in the order of the checkpoints.

    Raises:
        UsageError: An argument, a checkpoint, its data or the folder is not usable; nothing was lost.
        Stopped: As was asked through `stopping`; the same call goes on.
    """
    folders = _name_folders(args)
    if len(args.norm) != 1 and args.eps is not None:
        raise UsageError(f"--eps {args.eps:g} is a radius in one norm: name it with --norm linf or --norm l2")
    if "autoattack" in SUITES[args.suite].parts:
        check_autoattack()
    device = find_device(args.device)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    subjects = [
        load_subject(path, name, device=device, data_dir=args.data_dir, host=args.host)
        for path, name in zip(args.checkpoints, folders, strict=True)
    ]
    _check_alike(subjects)
    return [_Evaluation(args, subject, subjects, folders[subject.name], on_step).execute() for subject in subjects]


def _name_folders(args: EvaluateArgs) -> dict[str, Path]:
    """Return the folder of each checkpoint's evaluation, by a name that is unique among them."""
    paths = [Path(path) for path in args.checkpoints]
    if len(paths) == 1:
        return {"model": Path(args.output_dir) if args.output_dir else paths[0].parent / EVALUATION_FOLDER}
    if args.output_dir is None:
        raise UsageError(f"{len(paths)} checkpoints are evaluated together: say where with --output_dir")
    folders: dict[str, Path] = {}
    for path in paths:
        parent = path.resolve().parent.name
        stem = name = parent if path.stem == "model" else f"{parent}-{path.stem}"
        k = 1
        while name in folders:
            k += 1
            name = f"{stem}-{k}"
        folders[name] = Path(args.output_dir) / name
    return folders


def _check_alike(subjects: Sequence[Subject]) -> None:
    """Refuse checkpoints that cannot be shown each other's examples."""
    first = subjects[0]
    for subject in subjects[1:]:
        ids = [one.args.get("data_id") for one in (first, subject)]
        if None not in ids and ids[0] != ids[1]:
            raise UsageError(
                f"{subject.path} and {first.path} were trained on two data sets of the name {first.dataset}: evaluate "
                "them one by one"
            )
        for what, own_value, its in (
            ("data set", first.dataset, subject.dataset),
            ("shape", list(first.data.dataset.input_shape), list(subject.data.dataset.input_shape)),
            ("number of classes", first.n_classes, subject.n_classes),
        ):
            if own_value != its:
                raise UsageError(
                    f"{subject.path} and {first.path} differ in their {what} ({its} and {own_value}): evaluate them "
                    "one by one"
                )


class _Evaluation:
    """One model's evaluation in its folder."""

    def __init__(
        self,
        args: EvaluateArgs,
        subject: Subject,
        subjects: Sequence[Subject],
        folder: Path,
        on_step: Callable[[int, int], None] | None = None,
    ) -> None:
        self.args, self.subject, self.folder, self.on_step = args, subject, folder, on_step
        self.suite = SUITES[args.suite]
        self.n_examples = self.suite.n_examples if args.n_examples is None else args.n_examples
        self.others = {other.name: other.model for other in subjects if other is not subject}
        self.radii = [
            Radius(norm, args.eps or get_eps(norm, subject.is_small), get_grid(norm, subject.is_small))
            for norm in args.norm
        ]
        self.outside = self._find_outside()
        self.teachers, self.reasons = find_teachers(subject)
        self._explain_gaps()
        self.chosen = subject.choose(self.n_examples, args.seed)
        self.settings = {
            "suite": args.suite,
            "n_examples": self.n_examples,
            "seed": args.seed,
            "norm": list(args.norm),
            "eps": args.eps,
            "ood": [outside.name for outside in self.outside],
            "checkpoint": subject.path.name,
            "weights": subject.weights,
            "against": [other.weights for other in subjects if other is not subject],
            "images": subject.fingerprint(self.chosen),
        }
        if any(outside.fingerprint for outside in self.outside):
            self.settings["outside"] = [outside.fingerprint for outside in self.outside]
        self.machine = describe_machine(subject.model.device, "fp32")

    def execute(self) -> dict[str, Any]:
        """Ask what has not been answered, and return the json."""
        with open_journal(self.folder, self.settings) as journal:
            write_text(self.folder / EXAMPLES_FILE, json.dumps(self.chosen) + "\n")
            self.journal = journal
            self._ask_batches()
            self._ask_whole()
            record = self._build_record()
            write_text(self.folder / EVALUATION_FILE, json.dumps(record, indent=1) + "\n")
            write_text(self.folder / CARD_FILE, format_card(record))
            write_text(self.folder / DONE_FILE, "done")
        return record

    def _find_outside(self) -> list[Outside]:
        wanted = list(self.args.ood) or (["noise"] if "ood" in self.suite.parts else [])
        found = [find_outside(text, self.subject, self.args.data_dir) for text in wanted]
        names = [outside.name for outside in found]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UsageError(f"--ood: two sets are called {twice[0]}, which the answers could not tell apart: name one")
        return found

    def _explain_gaps(self) -> None:
        """Say what the suite asks and this model cannot be asked."""
        parts = self.suite.parts
        if not self.subject.has_box:
            noise = f"the images of {self.subject.dataset} are noise, whose values have no bounds"
            self.reasons += [f"{part}: {noise}" for part in ("corruptions", "autoattack") if part in parts]
        if "transfer" in parts and not self.others:
            self.reasons.append("transfer: it takes two checkpoints or more")

    def _ask_batches(self) -> None:
        """Ask every task of every batch, which is loaded once for all of them."""
        subject = self.subject
        tasks = list_tasks(subject.model, self.suite, self.radii, self.others, subject.has_box)
        held_out = {subject.environments[i] for i in subject.held_out}
        work: list[tuple[str, int, list[int], list[Task]]] = []
        for env, positions in self.chosen.items():
            asked = [task for task in tasks if env in held_out or not task.held_out_only]
            for batch, part in enumerate(subject.list_batches(positions)):
                left = [task for task in asked if name_finding(task.name, env, batch) not in self.journal.findings]
                work.append((env, batch, part, left))
        n_questions = len(self.journal.findings) + sum(len(left) for *_, left in work)
        progress = Progress([(task.name, task.cost * len(part)) for *_, part, left in work for task in left])
        for env, batch, part, left in work:
            if not left:
                continue
            x, y = subject.load(env, part)
            for task in left:
                name = name_finding(task.name, env, batch)
                if self.on_step is None:
                    progress.show(f"{subject.path}: {task.name} on {env}")
                self._answer(name, functools.partial(task.ask, x, y))
                progress.advance(task.name, task.cost * len(part), self.journal.seconds[name])
                if self.on_step is not None:
                    self.on_step(len(self.journal.findings), n_questions)

    def _ask_whole(self) -> None:
        """Ask what only all examples at once can tell."""
        subject, chosen = self.subject, self.chosen
        self._answer("calibration", lambda _: whole.measure_calibration(subject, chosen))
        if self.outside:
            self._answer("ood", self._measure_detection)
        if self.teachers:
            self._answer("fidelity", self._measure_fidelity)

    def _measure_detection(self, _: torch.Generator) -> list[dict[str, Any]]:
        measured = [whole.measure_detection(self.subject, self.chosen, out, self.args.seed) for out in self.outside]
        return [row for rows in measured for row in rows]

    def _measure_fidelity(self, _: torch.Generator) -> dict[str, Any]:
        """Return the fidelity to the teacher; to each other slot's under its name."""
        by_slot = {
            slot: {"teacher": name} | whole.measure_fidelity(self.subject, self.chosen, model)
            for slot, (name, model) in self.teachers.items()
        }
        first = next(iter(by_slot))
        return by_slot.pop(first) | by_slot

    def _answer(self, name: str, ask: Callable[[torch.Generator], Any]) -> None:
        """Have a finding in the journal, asking for it where it is missing; all that is random follows its name."""
        if name in self.journal.findings:
            return
        if stopping.is_requested():
            raise stopping.Stopped(f"stopped before {name} in {self.folder}; the same command goes on")
        started = time.perf_counter()
        seed = self.subject.host.misc.seed_hash("evaluate", self.args.seed, name)
        while (finding := self._try(ask, seed)) is None:
            self._halve(name)
        seconds = time.perf_counter() - started
        self.journal.put(name, finding, seconds, measure_peak_memory(self.subject.model.device), self.machine)

    def _try(self, ask: Callable[[torch.Generator], Any], seed: int) -> Any:
        """Return a finding; None where memory ran out."""
        try:
            with preserve_states():
                torch.manual_seed(seed)  # a model that draws at random draws the same wherever it goes on
                return ask(torch.Generator().manual_seed(seed))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _halve(self, name: str) -> None:
        """Have all models take half as many images at a time; what is random is drawn for whole batches all the same.

        Raises:
            RunError: They took one.
        """
        torch.cuda.empty_cache()
        at_once = (self.subject.model.at_once or self.subject.batch_size) // 2
        if not at_once:
            raise RunError(f"{self.subject.path}: no memory for one image at a time ({name}): use a larger machine")
        print(f"{self.subject.path}: memory has run out, going on with {at_once} images at a time", file=sys.stderr)
        for model in (self.subject.model, *self.others.values(), *(model for _, model in self.teachers.values())):
            model.at_once = at_once

    def _build_record(self) -> dict[str, Any]:
        subject, args = self.subject, self.args
        facts = {
            "checkpoint": subject.given,
            "algorithm": subject.algorithm,
            "dataset": subject.dataset,
            "test_envs": subject.held_out,
        }
        protocol = Protocol(args.suite, self.n_examples, args.seed, self.radii, self.suite, self.reasons)
        findings = Findings(self.journal.findings, subject.environments)
        held_out = [subject.environments[i] for i in subject.held_out]
        return build_record(facts, protocol, findings, held_out, self._sum_cost())

    def _sum_cost(self) -> dict[str, Any]:
        """Return what it took, over all starts: seconds, in all and by question, memory, and the machine."""
        seconds: dict[str, float] = defaultdict(float)
        for name, spent in self.journal.seconds.items():
            seconds[name.split(" | ")[0]] += spent
        return {
            "seconds": round(sum(seconds.values()), 3),
            "seconds_by_part": {name: round(spent, 3) for name, spent in seconds.items()},
            "peak_memory_mb": self.journal.peak,
            "machine": self.journal.machine,
        }
