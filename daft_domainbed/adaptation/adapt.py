"""The protocol: which methods meet which streams, and where what came of it is kept.

Every stream that was met goes into the journal of the folder, so that what was killed goes on. The protocol is OWTTT's
(Li et al., 2023, arXiv 2308.09942): a single pass, adapted to batch by batch, and rejected by a threshold that follows.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from daft_domainbed.adaptation.card import format_card
from daft_domainbed.adaptation.methods import METHODS, Adapter
from daft_domainbed.adaptation.network import Network
from daft_domainbed.adaptation.record import build_rows, count_trials, name_stream
from daft_domainbed.adaptation.sources import LABELS, SourceStatistics, measure_sources
from daft_domainbed.adaptation.stream import Stream, make_stream
from daft_domainbed.adaptation.threshold import AdaptiveThreshold
from daft_domainbed.errors import UsageError
from daft_domainbed.evaluation.journal import Journal, open_journal
from daft_domainbed.evaluation.outside import find_outside, name_outside
from daft_domainbed.evaluation.progress import Progress
from daft_domainbed.evaluation.subject import Subject, load_subject
from daft_domainbed.models.weights import load, save
from daft_domainbed.runtime import stopping
from daft_domainbed.runtime.files import write_text
from daft_domainbed.runtime.layout import ADAPTATION_FILE, ADAPTATION_FOLDER, DONE_FILE
from daft_domainbed.runtime.machine import describe_machine, find_device, measure_peak_memory
from daft_domainbed.runtime.randomness import preserve_states

CARD_FILE = "adaptation.md"


@dataclass(frozen=True)
class AdaptArgs:
    """The arguments of an adaptation.

    Attributes:
        checkpoint: A file `model.pkl`, as it was given.
        test_env: A held-out domain of its training.
        strong_ood: A set of outside images, as `evaluate --ood` takes.
        strong_ratio: Outside images to one of the domain's; 0 for a closed set.
        n_trials: Orders of the stream.
        output_dir: A folder below `adaptation/` beside the checkpoint, unless given.
        save: Whether the checkpoint as adapted on the first order is written, beside the one that was given.
    """

    checkpoint: str
    test_env: int
    strong_ood: str = "noise"
    strong_ratio: float = 1.0
    methods: Sequence[str] = tuple(METHODS)
    batch_size: int = 64
    n_trials: int = 5
    seed: int = 0
    data_dir: str | None = None
    output_dir: str | None = None
    save: bool = False
    host: str | None = None
    device: str = "auto"


def name_streams(test_env: int, strong_ood: str, strong_ratio: float) -> str:
    """Return what the files of an adaptation to such streams are called.

    Example:
        >>> name_streams(0, "folder:/data/textures", 0.5)
        '0-folder_textures-0.5'
    """
    return f"{test_env}-{re.sub('[^A-Za-z0-9._-]+', '_', name_outside(strong_ood))}-{strong_ratio:g}"


def name_folder(test_env: int, strong_ood: str, strong_ratio: float) -> str:
    """Return the folder of an adaptation below its checkpoint's.

    Example:
        >>> name_folder(0, "noise", 1)
        'adaptation/0-noise-1'
    """
    return f"{ADAPTATION_FOLDER}/{name_streams(test_env, strong_ood, strong_ratio)}"


def adapt(args: AdaptArgs, *, on_step: Callable[[int, int], None] | None = None) -> tuple[dict[str, Any], str]:
    """Adapt a checkpoint to streams, or go on with it, or return what is stored.

    Args:
        args: What to adapt, to what.
        on_step: Told after each stream how many were met, and of how many, in the place of lines on standard error.

    Returns:
        The json, and the card.

    Raises:
        UsageError: An argument, the checkpoint, its data or the folder is not usable; nothing was lost.
        Stopped: As was asked through `stopping`; the same call goes on.
    """
    path = Path(args.checkpoint)
    if args.save and not any(METHODS[name].changes_weights for name in args.methods):
        able = ", ".join(name for name, method in METHODS.items() if method.changes_weights)
        raise UsageError(f"--save: none of {', '.join(args.methods)} leaves a checkpoint that is adapted; add {able}")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    subject = load_subject(
        args.checkpoint, "model", device=find_device(args.device), data_dir=args.data_dir, host=args.host
    )
    if args.test_env not in subject.held_out:
        known = ", ".join(f"{i} ({subject.environments[i]})" for i in subject.held_out)
        raise UsageError(f"--test_env {args.test_env}: {path} held out {known}; it has seen the others in training")
    outside = find_outside(args.strong_ood, subject, args.data_dir, [args.test_env]) if args.strong_ratio else None
    stream = make_stream(subject, args.test_env, outside, args.strong_ratio, args.seed)
    if outside is not None:
        wanted = round(args.strong_ratio * len(stream.weak))
        if not stream.strong:
            raise UsageError(f"--strong_ratio {args.strong_ratio:g} of {len(stream.weak)} images is none: 0 says so")
        if len(stream.strong) < wanted:
            print(f"{outside.name} has {len(stream.strong)} images, not {wanted}: all are used", file=sys.stderr)
    folder = (
        Path(args.output_dir)
        if args.output_dir
        else path.parent / name_folder(args.test_env, args.strong_ood, args.strong_ratio)
    )
    return _Adaptation(args, subject, stream, folder, on_step).execute()


def meet(adapter: Adapter, stream: Stream, trial: int, batch_size: int) -> dict[str, Any]:
    """Have a method meet a stream in some order.

    Returns:
        How many images there were of either kind, how many of known classes were `right` and not rejected, or rightly
        `answered`, rejected or not, how many outside images were `rejected`, and the method's notice.
    """
    threshold, counts = AdaptiveThreshold(), {"right": 0, "answered": 0, "rejected": 0}
    for x, y in stream.list_batches(trial, batch_size):
        answers, scores = adapter.answer(x)
        is_rejected, is_right = scores > threshold.update(scores), answers == y
        counts["right"] += int((is_right & ~is_rejected).sum())
        counts["answered"] += int(is_right.sum())
        counts["rejected"] += int((is_rejected & (y == stream.subject.n_classes)).sum())
    return {**counts, "n_weak": len(stream.weak), "n_strong": len(stream.strong), "notice": adapter.notice}


class _Adaptation:
    """One model's adaptation in its folder."""

    def __init__(
        self,
        args: AdaptArgs,
        subject: Subject,
        stream: Stream,
        folder: Path,
        on_step: Callable[[int, int], None] | None = None,
    ) -> None:
        self.args, self.subject, self.stream, self.folder, self.on_step = args, subject, stream, folder, on_step
        self.source: SourceStatistics | None = None
        self.settings = {
            "test_env": args.test_env,
            "strong_ood": stream.outside.name if stream.outside else None,
            "strong_ratio": args.strong_ratio,
            "batch_size": args.batch_size,
            "seed": args.seed,
            "checkpoint": subject.path.name,
            "weights": subject.weights,
            "images": subject.fingerprint({name: [] for name in subject.environments} | {stream.env: stream.weak}),
            "n_weak": len(stream.weak),
            "n_strong": len(stream.strong),
            "source_labels": LABELS,
        }
        if stream.outside and stream.outside.fingerprint:
            self.settings["outside"] = stream.outside.fingerprint
        self.machine = describe_machine(subject.model.device, "fp32")

    def execute(self) -> tuple[dict[str, Any], str]:
        """Meet the streams that were not met, and return json and card."""
        args = self.args
        with open_journal(self.folder, self.settings, "an adaptation") as journal:
            asked = [(name, trial) for name in args.methods for trial in range(args.n_trials)]
            progress = Progress(
                [(name, 1) for name, trial in asked if name_stream(name, trial) not in journal.findings]
            )
            for k, (name, trial) in enumerate(asked):
                self._meet(journal, name, trial, progress)
                if self.on_step is not None:
                    self.on_step(k + 1, len(asked))
            # What is stored is all that was ever met, whatever this call asks for.
            stored = self._build_record(journal, count_trials(journal.findings, tuple(METHODS)))
            write_text(self.folder / ADAPTATION_FILE, json.dumps(stored, indent=1) + "\n")
            write_text(self.folder / CARD_FILE, format_card(stored, self.settings, journal))
            write_text(self.folder / DONE_FILE, "done")
            record = self._build_record(journal, dict.fromkeys(args.methods, args.n_trials))
            return record, format_card(record, self.settings, journal)

    def _build_record(self, journal: Journal, n_trials: Mapping[str, int]) -> dict[str, Any]:
        args = self.args
        return {
            "schema": 1,
            "checkpoint": str(args.checkpoint),
            "test_env": args.test_env,
            "strong_ood": name_outside(args.strong_ood),
            "strong_ratio": args.strong_ratio,
            "batch_size": args.batch_size,
            "rows": build_rows(journal.findings, n_trials),
        }

    def _meet(self, journal: Journal, name: str, trial: int, progress: Progress) -> None:
        """Have a method meet a stream in some order, unless that is in the journal."""
        args, path = self.args, self.subject.path
        saved = path.with_name(
            f"{path.stem}_{name}_{name_streams(args.test_env, args.strong_ood, args.strong_ratio)}.pkl"
        )
        is_saved = args.save and trial == 0 and METHODS[name].changes_weights
        key = name_stream(name, trial)
        if key in journal.findings and not (is_saved and _read_note(saved) != self._describe(name)):
            return
        if stopping.is_requested():
            raise stopping.Stopped(f"stopped before {key} in {self.folder}; the same command goes on")
        if self.on_step is None:
            progress.show(f"{self.subject.path}: {name}, order {trial}")
        started = time.perf_counter()
        if self.source is None and METHODS[name].uses_features:
            self.source = measure_sources(self.subject)
        network = Network(self.subject.model)
        with preserve_states():
            torch.manual_seed(self.subject.host.misc.seed_hash("adapt", self.args.seed, key))
            adapter = METHODS[name](network, self.source)
            finding = meet(adapter, self.stream, trial, self.args.batch_size)
        if finding["notice"]:
            print(f"{self.subject.path}: {name}, order {trial}: {finding['notice']}", file=sys.stderr)
        if is_saved:
            self._save(network, saved, name)
            print(f"saved {saved}, whose features are adapted and whose head is as it was", file=sys.stderr)
        if key not in journal.findings:
            seconds = time.perf_counter() - started
            journal.put(key, finding, seconds, measure_peak_memory(self.subject.model.device), self.machine)
            progress.advance(name, 1, seconds)

    def _save(self, network: Network, path: Path, method: str) -> None:
        """Write the checkpoint as it was adapted, which no run may take for a teacher: it has seen the domain."""
        state = {name: value.cpu() for name, value in network.model.algorithm.state_dict().items()}
        save({**self.subject.content, "model_dict": state, "adapted": self._describe(method)}, path)

    def _describe(self, method: str) -> dict[str, Any]:
        """Return what an adapted checkpoint says of itself."""
        names = ("test_env", "strong_ood", "strong_ratio", "batch_size", "seed", "weights", "outside")
        return {"method": method} | {name: self.settings[name] for name in names if name in self.settings}


def _read_note(path: Path) -> Any:
    """Return what an adapted checkpoint says of itself; None where there is none, or none that can be read."""
    try:
        return load(path).get("adapted") if path.is_file() else None
    except UsageError:
        return None
