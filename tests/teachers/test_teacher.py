from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from daft_domainbed import plugin
from daft_domainbed.arguments import TrainArgs
from daft_domainbed.errors import UsageError
from daft_domainbed.host import checkpoints, contract
from daft_domainbed.host.contract import describe_dataset
from daft_domainbed.methods import find_method, list_slots
from daft_domainbed.models import weights
from daft_domainbed.plugin.defaults import get_random_hparams
from daft_domainbed.teacher import load_teacher
from daft_domainbed.teachers.facts import RunFacts
from daft_domainbed.teachers.find import find_teachers
from daft_domainbed.teachers.plan import TeacherJob, plan_teacher
from daft_domainbed.teachers.teacher import Teacher
from daft_domainbed.training.engine import train_teacher
from tests.conftest import get_defaults

Refuse = Callable[..., str]
FOLDER_HPARAMS = {"input_size": 16, "batch_size": 4}


@pytest.fixture
def refuse(tiny: Any, run_train: Callable[..., tuple[int, list[str]]]) -> Refuse:
    """Gives a student a teacher, which must be refused with exit status 2, one line and no trace; returns the line."""

    def run(path: Path | str, **flags: Any) -> str:
        algorithm = flags.pop("algorithm", "KD")
        hparams = {**flags.pop("hparams", {}), "teacher": str(path)}
        status, lines = run_train(tiny.make_argv("student", hparams, algorithm=algorithm, **flags))
        assert (status, len(lines)) == (2, 1), lines
        assert not (tiny.root / "student").exists()
        assert str(Path(path).parent) in lines[0]
        return lines[0]

    return run


def change(path: Path, target: Path, **changes: Any) -> Path:
    """Write a checkpoint with some of its contents changed, or left out where the change is None."""
    content = checkpoints.load_checkpoint(path) | changes
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: value for key, value in content.items() if value is not None}, target)
    return target


def find_teacher(run: RunFacts, hparams: dict[str, Any], algorithm: str = "KD") -> Teacher:
    """Find the teacher that a run would have with other hyperparameters, or another algorithm."""
    args = replace(run.args, algorithm=algorithm)
    defaults = get_defaults(run.host, algorithm, args.dataset, dict(run.user_hparams))
    other = replace(run, args=args, hparams=defaults | hparams)
    return find_teachers(other, lambda args: train_teacher(args, algorithm, print))["teacher"]


def set_last_record(folder: Path, **values: Any) -> None:
    lines = (folder / "results.jsonl").read_text().splitlines()
    lines[-1] = json.dumps(json.loads(lines[-1]) | values)
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n")


class TestWrongTeacher:
    @pytest.mark.parametrize(
        ("flags", "phrase"),
        [
            ({"test_envs": [1]}, "test_envs is [1] there and [0] here"),
            ({"test_envs": [1, 2]}, "test_envs is [1, 2] there and [0] here"),
            ({"trial_seed": 1}, "trial_seed is 1 there and 0 here"),
            ({"holdout_fraction": 0.3}, "holdout_fraction is 0.3 there and 0.2 here"),
            ({"uda_holdout_fraction": 0.7}, "uda_holdout_fraction is 0.7 there and 0.0 here"),
            ({"dataset": "ColoredDigits"}, "dataset is ColoredDigits there and Debug28 here"),
            ({"seed": 1}, "the data of env0_in have fingerprint "),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_is_refused_by_the_field_that_differs(
        self, tiny: Any, refuse: Refuse, flags: dict[str, Any], phrase: str
    ) -> None:
        path = tiny.make_teacher("ERM", steps=1, **flags)
        assert phrase in refuse(path)

    def test_aft_takes_no_average_of_networks(self, tiny: Any, refuse: Refuse) -> None:
        path = tiny.train("sma", algorithm="SMA") / "model.pkl"
        assert "is a checkpoint of SMA, whose weights are more than a network's" in refuse(path, algorithm="AFT")

    def test_a_field_is_named_before_what_follows_from_it(self, tiny: Any, refuse: Refuse) -> None:
        line = refuse(tiny.make_teacher("ERM", steps=1, trial_seed=1, holdout_fraction=0.3))
        phrases = ["trial_seed is 1", "holdout_fraction is 0.3", "the data of env0_in", "the data of env2_out"]
        places = [line.index(phrase) for phrase in phrases]
        assert places == sorted(places)

    def test_another_shape_is_named_with_another_data_set(self, tiny: Any, refuse: Refuse) -> None:
        line = refuse(tiny.make_teacher("ERM", steps=1, dataset="ColoredDigits"))
        assert "input_shape is [2, 28, 28] there and [3, 28, 28] here" in line
        assert "fingerprint" not in line

    def test_colored_digits_of_another_seed(self, tiny: Any, refuse: Refuse) -> None:
        """The seed deals out the digits: the same names are other splits, with held-out digits among them."""
        path = tiny.make_teacher("ERM", steps=1, dataset="ColoredDigits", seed=1)
        line = refuse(path, dataset="ColoredDigits")
        assert " is " not in line.partition(": ")[2].partition("the data of env0_in have fingerprint")[0]
        assert all(f"the data of env{i}_{part}" in line for i in range(3) for part in ("in", "out"))

    def test_an_aft_teacher_is_refused_by_the_same_rules(
        self, tiny: Any, refuse: Refuse, teachers: dict[str, Path]
    ) -> None:
        assert "trial_seed is 0 there and 1 here" in refuse(teachers["AFT"], algorithm="DAFT", trial_seed=1)
        assert "trial_seed is 0 there and 1 here" in refuse(teachers["ERM"], algorithm="AFT", trial_seed=1)

    @pytest.mark.parametrize(
        ("algorithm", "kind", "hint"),
        [
            ("DAFT", "ERM", "or distil this one with --algorithm KD"),
            ("KD", "AFT", "or distil it with --algorithm DAFT"),
            ("AFT", "AFT", "or fine-tune an ERM checkpoint"),
        ],
    )
    def test_of_the_wrong_kind(
        self, refuse: Refuse, teachers: dict[str, Path], algorithm: str, kind: str, hint: str
    ) -> None:
        line = refuse(teachers[kind], algorithm=algorithm)
        assert f"is a checkpoint of {kind}" in line
        assert f"'daft-domainbed train --algorithm {'AFT' if algorithm == 'DAFT' else 'ERM'}'" in line
        assert hint in line

    def test_a_folder_of_images_that_has_changed_since(self, tiny: Any, refuse: Refuse, image_folder: Path) -> None:
        flags = {"dataset": f"folder:{image_folder}", "hparams": FOLDER_HPARAMS}
        path = tiny.train("ERM", steps=1, **flags) / "model.pkl"
        picture = image_folder / "b" / "x" / "4.png"
        with picture.open("ab") as file:
            file.write(b"one byte more")
        assert "the data of env1_" in refuse(path, **flags)

    def test_one_in_the_store_that_has_become_wrong_is_to_be_deleted(
        self, tiny: Any, image_folder: Path, run_train: Callable[..., tuple[int, list[str]]]
    ) -> None:
        flags = {"algorithm": "KD", "dataset": f"folder:{image_folder}", "hparams": FOLDER_HPARAMS, "steps": 1}
        run_train(tiny.make_argv("first", **flags))
        (stored,) = (tiny.root / "teachers").iterdir()
        run_train(tiny.make_argv("other", **flags, trial_seed=1))
        (other,) = set((tiny.root / "teachers").iterdir()) - {stored}
        shutil.copytree(other, stored, dirs_exist_ok=True)
        status, lines = run_train(tiny.make_argv("second", **flags))
        assert (status, len(lines)) == (2, 1)
        assert f"Delete {stored}" in lines[0]

    def test_without_a_run_no_teacher_is_trusted(self, teachers: dict[str, Path]) -> None:
        with pytest.raises(UsageError, match="nothing says which data set"):
            load_teacher("KD", {"teacher": str(teachers["ERM"])})


class TestRightTeacher:
    def test_by_file(self, tiny: Any, teachers: dict[str, Path], records: Callable[..., Any]) -> None:
        for algorithm, kind in (("KD", "ERM"), ("DAFT", "AFT"), ("AFT", "ERM")):
            run = tiny.train(algorithm, {"teacher": str(teachers[kind])}, algorithm=algorithm)
            described = records(run)[0]["teacher"]
            assert described["algorithm"] == kind
            assert (run / described["path"]).resolve() == teachers[kind]
        assert not (tiny.root / "teachers").exists()

    def test_the_home_folder_is_known(
        self, gather_facts: Callable[..., Any], teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(teachers["ERM"].parents[1]))
        run = gather_facts()
        assert find_teacher(run, {"teacher": "~/ERM/model.pkl"}).path == teachers["ERM"]

    def test_order_of_held_out_domains_does_not_matter(self, tiny: Any, records: Callable[..., Any]) -> None:
        path = tiny.make_teacher("ERM", steps=1, test_envs=[2, 0])
        run = tiny.train("student", {"teacher": str(path)}, algorithm="KD", steps=1, test_envs=[0, 2])
        assert records(run)[0]["teacher"]["steps"] == 1

    def test_images_of_any_seed_that_does_not_make_them(
        self, tiny: Any, image_folder: Path, records: Callable[..., Any]
    ) -> None:
        flags = {"dataset": f"folder:{image_folder}", "steps": 1}
        path = tiny.train("ERM", FOLDER_HPARAMS, seed=1, **flags) / "model.pkl"
        run = tiny.train("student", {**FOLDER_HPARAMS, "teacher": str(path)}, algorithm="KD", **flags)
        assert records(run)[0]["teacher"]["steps"] == 1

    @pytest.mark.parametrize(
        ("algorithm", "kind", "idle"), [("DAFT", "AFT", "aft_eps, teacher_backbone"), ("KD", "ERM", "teacher_backbone")]
    )
    def test_a_named_one_is_said_and_what_it_leaves_without_effect(
        self, tiny: Any, teachers: dict[str, Path], algorithm: str, kind: str, idle: str
    ) -> None:
        hparams = {"teacher": str(teachers[kind])} | ({"aft_eps": 0.1} if algorithm == "DAFT" else {})
        log = (tiny.train("run", hparams, algorithm=algorithm) / "err.txt").read_text().splitlines()
        assert log[0].endswith(f"({kind})")
        assert log[1].startswith(f"{idle} have no effect")

    def test_a_students_run_in_the_folder_is_passed_over(
        self, tiny: Any, teachers: dict[str, Path], gather_facts: Callable[..., Any]
    ) -> None:
        store = tiny.root / "store"
        shutil.copytree(teachers["ERM"].parent, store / "erm")
        student = tiny.train("store/kd", {"teacher": str(teachers["ERM"])}, algorithm="KD")
        set_last_record(student, env1_out_acc=1.0, env2_out_acc=1.0)
        run = gather_facts()
        assert find_teacher(run, {"teacher": str(store)}).path == store / "erm" / "model.pkl"
        assert find_teacher(run, {"teacher": str(student / "model.pkl")}).path == student / "model.pkl"

    def test_images_that_have_moved(self, tiny: Any, image_folder: Path) -> None:
        path = tiny.train("ERM", FOLDER_HPARAMS, dataset=f"folder:{image_folder}", steps=1) / "model.pkl"
        moved = tiny.root / "elsewhere" / image_folder.name
        shutil.move(image_folder, moved)
        hparams = {**FOLDER_HPARAMS, "teacher": str(path)}
        assert (tiny.train("student", hparams, algorithm="KD", dataset=f"folder:{moved}", steps=1) / "done").is_file()


class TestSearch:
    @pytest.fixture
    def candidates(self, tiny: Any, teachers: dict[str, Path]) -> dict[str, Path]:
        """Four teachers of equal data: one good, one better, one misled by its held-out domain, one broken."""
        folders = {name: tiny.root / "store" / name for name in ("a", "b", "c", "d")}
        for folder in folders.values():
            shutil.copytree(teachers["ERM"].parent, folder)
        set_last_record(folders["a"], env0_out_acc=0.5, env1_out_acc=0.5, env2_out_acc=0.7)
        set_last_record(folders["b"], env0_out_acc=0.0, env1_out_acc=0.9, env2_out_acc=0.5)
        set_last_record(folders["c"], env0_out_acc=1.0, env1_out_acc=0.4, env2_out_acc=0.4)
        (folders["d"] / "model.pkl").write_bytes(b"broken")
        return folders

    def find(self, gather_facts: Callable[..., Any], folder: Path, **flags: Any) -> Path:
        run = gather_facts(**flags)
        return find_teacher(run, {"teacher": str(folder)}).path

    def test_the_best_on_training_domains_wins(
        self, gather_facts: Callable[..., Any], candidates: dict[str, Path]
    ) -> None:
        store = candidates["a"].parent
        assert self.find(gather_facts, store) == candidates["b"] / "model.pkl"
        assert self.find(gather_facts, store.parent) == candidates["b"] / "model.pkl"
        assert self.find(gather_facts, candidates["a"]) == candidates["a"] / "model.pkl"
        set_last_record(candidates["a"], env1_out_acc=0.8)
        assert self.find(gather_facts, store) == candidates["a"] / "model.pkl"

    @pytest.mark.parametrize("poison", ["no number", None, {"a": 1}, 1e9, -1e9])
    def test_what_the_held_out_domain_says_is_never_read(
        self, gather_facts: Callable[..., Any], candidates: dict[str, Path], poison: object
    ) -> None:
        for folder in candidates.values():
            set_last_record(folder, env0_in_acc=poison, env0_out_acc=poison)
        set_last_record(candidates["b"], env0_in_acc=0.0, env0_out_acc=0.0)
        assert self.find(gather_facts, candidates["a"].parent) == candidates["b"] / "model.pkl"

    def test_a_teacher_without_records_comes_last(
        self, gather_facts: Callable[..., Any], candidates: dict[str, Path]
    ) -> None:
        (candidates["b"] / "results.jsonl").write_text('{"half')
        (candidates["a"] / "results.jsonl").unlink()
        assert self.find(gather_facts, candidates["a"].parent) == candidates["c"] / "model.pkl"

    def test_the_first_of_equals(self, gather_facts: Callable[..., Any], candidates: dict[str, Path]) -> None:
        set_last_record(candidates["a"], env1_out_acc=0.9, env2_out_acc=0.5)
        assert self.find(gather_facts, candidates["a"].parent) == candidates["a"] / "model.pkl"

    def test_those_that_do_not_match_are_passed_over(self, tiny: Any, gather_facts: Callable[..., Any]) -> None:
        right = tiny.make_teacher("ERM", "store/right", steps=1)
        for name, flags in {"env": {"test_envs": [1]}, "trial": {"trial_seed": 1}}.items():
            wrong = tiny.make_teacher("ERM", f"store/{name}", steps=1, **flags)
            set_last_record(wrong.parent, **{f"env{i}_out_acc": 1.0 for i in range(3)})
        set_last_record(right.parent, **{f"env{i}_out_acc": 0.0 for i in range(3)})
        assert self.find(gather_facts, tiny.root / "store") == right

    def test_none_matches(self, refuse: Refuse, candidates: dict[str, Path]) -> None:
        line = refuse(candidates["a"].parent, trial_seed=1)
        assert "none of the 4 checkpoints in" in line
        assert "trial_seed is 0 there and 1 here" in line
        assert "(and 3 more)" in line

    def test_no_checkpoint_at_all(self, refuse: Refuse, tiny: Any) -> None:
        (tiny.root / "store").mkdir()
        assert "no model.pkl in" in refuse(tiny.root / "store")


def write_upstream_checkpoint(path: Path, data: str, algorithm: str = "ERM", **args: Any) -> Path:
    """Write what DomainBed's own loop writes: NumPy scalars among the hyperparameters, and nothing of ours."""
    host = contract.find_host()
    kind = contract.get_dataset_class(host, data)
    hparams = host.hparams_registry.random_hparams("ERM", data, 1)
    hparams = {name: value for name, value in hparams.items() if name not in ("backbone", "weights", "pixels")}
    hparams |= {"lr": np.float64(1e-3), "batch_size": np.int64(8), "flag": np.bool_(True)}
    network = host.algorithms.ERM(kind.INPUT_SHAPE, kind.num_classes, len(kind.ENVIRONMENTS) - 1, hparams)
    defaults = {
        "algorithm": algorithm,
        "checkpoint_freq": None,
        "data_dir": "/somewhere/else",
        "dataset": data,
        "hparams": None,
        "hparams_seed": 0,
        "holdout_fraction": 0.2,
        "output_dir": "train_output",
        "save_model_every_checkpoint": False,
        "seed": 0,
        "skip_model_save": False,
        "steps": None,
        "task": "domain_generalization",
        "test_envs": [0],
        "trial_seed": 0,
        "uda_holdout_fraction": 0,
    }
    content = {
        "args": {name: value for name, value in (defaults | args).items() if value != "missing"},
        "model_input_shape": kind.INPUT_SHAPE,
        "model_num_classes": kind.num_classes,
        "model_num_domains": len(kind.ENVIRONMENTS) - 1,
        "model_hparams": hparams,
        "model_dict": network.state_dict(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


class TestUpstreamCheckpoints:
    @pytest.mark.parametrize("dataset", ["Debug28", "EmojiStyles", "ColoredDigits"])
    def test_the_right_one_is_taken(
        self, tiny: Any, records: Callable[..., Any], gather_facts: Callable[..., Any], dataset: str
    ) -> None:
        path = write_upstream_checkpoint(tiny.root / "old" / "model.pkl", dataset)
        run = gather_facts(dataset=dataset)
        made = find_teacher(run, {"teacher": str(path)})
        assert made.facts["sha256"] == weights.hash_state(torch.load(path, weights_only=False)["model_dict"])
        assert made.facts["accuracies"] == {}
        assert "steps" not in made.facts

    @pytest.mark.parametrize(
        ("args", "phrase"),
        [
            ({"test_envs": [1]}, "test_envs is [1] there and [0] here"),
            ({"trial_seed": 1}, "trial_seed is 1 there and 0 here"),
            ({"holdout_fraction": 0.3}, "holdout_fraction is 0.3 there and 0.2 here"),
            ({"task": "domain_adaptation"}, "task is domain_adaptation there and domain_generalization here"),
            ({"uda_holdout_fraction": 0.5}, "uda_holdout_fraction is 0.5 there and 0.0 here"),
            ({"seed": 1}, "the data of env0_in have fingerprint"),
        ],
        ids=str,
    )
    def test_a_wrong_one_is_refused(self, tiny: Any, refuse: Refuse, args: dict[str, Any], phrase: str) -> None:
        assert phrase in refuse(write_upstream_checkpoint(tiny.root / "old" / "model.pkl", "Debug28", **args))

    @pytest.mark.parametrize("dataset", ["PACS", "VLCS"])
    def test_one_of_a_data_set_that_is_not_even_here(self, tiny: Any, refuse: Refuse, dataset: str) -> None:
        path = write_upstream_checkpoint(tiny.root / "old" / "model.pkl", "Debug28")
        args = checkpoints.load_checkpoint(path)["args"] | {"dataset": dataset, "trial_seed": 2}
        line = refuse(change(path, path, args=args))
        assert f"dataset is {dataset} there and Debug28 here; trial_seed is 2 there and 0 here." in line

    def test_seeds_do_not_matter_where_they_make_no_data(self, tiny: Any, gather_facts: Callable[..., Any]) -> None:
        path = write_upstream_checkpoint(tiny.root / "old" / "model.pkl", "EmojiStyles", seed=5)
        run = gather_facts(dataset="EmojiStyles")
        assert find_teacher(run, {"teacher": str(path)}).path == path

    @pytest.mark.parametrize("name", ["dataset", "test_envs", "trial_seed", "seed", "holdout_fraction"])
    def test_arguments_that_are_missing(self, tiny: Any, refuse: Refuse, name: str) -> None:
        path = write_upstream_checkpoint(tiny.root / "old" / "model.pkl", "Debug28", **{name: "missing"})
        assert f"its args lack {name}" in refuse(path)

    def test_flags_that_domainbed_once_had_not(
        self, tiny: Any, refuse: Refuse, gather_facts: Callable[..., Any]
    ) -> None:
        path = write_upstream_checkpoint(
            tiny.root / "old" / "model.pkl", "Debug28", task="missing", uda_holdout_fraction="missing"
        )
        run = gather_facts()
        assert find_teacher(run, {"teacher": str(path)}).path == path
        line = refuse(path, uda_holdout_fraction=0.7)
        assert "uda_holdout_fraction is 0.0 there and 0.7 here" in line

    @pytest.mark.parametrize(
        "args",
        [
            {"test_envs": 0},
            {"test_envs": "abc"},
            {"test_envs": None},
            {"seed": "x"},
            {"seed": -1},
            {"seed": 2**70},
            {"holdout_fraction": None},
            {"holdout_fraction": "0.2"},
            {"holdout_fraction": float("nan")},
            {"dataset": 5},
            {"dataset": None},
            {"uda_holdout_fraction": []},
        ],
        ids=str,
    )
    def test_arguments_that_make_no_sense(self, tiny: Any, refuse: Refuse, args: dict[str, Any]) -> None:
        refuse(write_upstream_checkpoint(tiny.root / "old" / "model.pkl", "Debug28", **args))

    def test_provenance_beside_the_checkpoint_counts(
        self, tiny: Any, refuse: Refuse, gather_facts: Callable[..., Any]
    ) -> None:
        """Upstream's loop under `host` leaves it there, since its checkpoint cannot carry it."""
        path = write_upstream_checkpoint(tiny.root / "old" / "model.pkl", "Debug28", seed="missing")
        run = gather_facts()
        (path.parent / "provenance.json").write_text(json.dumps(run.provenance))
        assert find_teacher(run, {"teacher": str(path)}).path == path
        (path.parent / "provenance.json").write_text(json.dumps(run.provenance | {"trial_seed": 4}))
        assert "of different runs (trial_seed is 4 and 0)" in refuse(path)

    def test_provenance_of_a_later_run_in_the_same_folder_does_not_count(
        self, tiny: Any, refuse: Refuse, gather_facts: Callable[..., Any]
    ) -> None:
        """Upstream's loop reuses folders: the weights there may be older than what lies beside them."""
        path = write_upstream_checkpoint(tiny.root / "old" / "model.pkl", "Debug28", test_envs=[1])
        (path.parent / "provenance.json").write_text(json.dumps(gather_facts().provenance))
        assert "of different runs (test_envs is [0] and [1])" in refuse(path)

    @pytest.mark.parametrize("content", [b"{half", b"\xff\xfe", b"[1]", b"{}", b'{"fingerprints": 3}'])
    def test_broken_provenance_beside_the_checkpoint(self, tiny: Any, refuse: Refuse, content: bytes) -> None:
        path = write_upstream_checkpoint(tiny.root / "old" / "model.pkl", "Debug28")
        (path.parent / "provenance.json").write_bytes(content)
        assert "make" in refuse(path)


class TestUnfit:
    def test_weights_that_do_not_fit_their_own_hyperparameters(
        self, tiny: Any, refuse: Refuse, teachers: dict[str, Path]
    ) -> None:
        content = checkpoints.load_checkpoint(teachers["ERM"])
        weights, hparams = content["model_dict"], content["model_hparams"]
        name = next(name for name in weights if weights[name].dim() == 4)
        changes: list[dict[str, Any]] = [
            {"model_hparams": hparams | {"backbone": "resnet8_w5"}},
            {"model_hparams": hparams | {"backbone": 5}},
            {"model_hparams": hparams | {"nonlinear_classifier": True}},
            {"model_hparams": {}},
            {"model_dict": {key: value for key, value in weights.items() if key != name}},
            {"model_dict": weights | {"more": torch.zeros(1)}},
            {"model_dict": weights | {name: weights[name][:, :1]}},
            {"model_dict": weights | {name: "text"}},
            {"model_dict": {}},
        ]
        for i, changed in enumerate(changes):
            line = refuse(change(teachers["ERM"], tiny.root / str(i) / "model.pkl", **changed))
            assert "do not fit the checkpoint's own hyperparameters" in line

    def test_another_class_count_or_shape(self, tiny: Any, refuse: Refuse, teachers: dict[str, Path]) -> None:
        """The checkpoint itself says what it takes and answers; what its provenance says is not believed."""
        path = tiny.root / "changed" / "model.pkl"
        assert "num_classes is 3 there and 2 here" in refuse(change(teachers["ERM"], path, model_num_classes=3))
        line = refuse(change(teachers["ERM"], path, model_input_shape=(1, 28, 28)))
        assert "input_shape is [1, 28, 28] there and [3, 28, 28] here" in line

    def test_a_backbone_that_nobody_has(self, tiny: Any, refuse: Refuse, teachers: dict[str, Path]) -> None:
        hparams = checkpoints.load_checkpoint(teachers["ERM"])["model_hparams"] | {"backbone": "resnet8"}
        path = change(teachers["ERM"], tiny.root / "changed" / "model.pkl", model_hparams=hparams)
        assert "no backbone 'resnet8'" in refuse(path)

    @pytest.mark.parametrize("kind", [["ERM"], None, 5, "NoSuchAlgorithm"])
    def test_of_no_known_algorithm(self, tiny: Any, refuse: Refuse, teachers: dict[str, Path], kind: Any) -> None:
        args = checkpoints.load_checkpoint(teachers["ERM"])["args"] | {"algorithm": kind}
        assert repr(kind) in refuse(change(teachers["ERM"], tiny.root / "changed" / "model.pkl", args=args))

    @pytest.mark.parametrize("broken", [{}, [], {"fingerprints": []}, "text", 3])
    def test_unreadable_provenance(self, tiny: Any, refuse: Refuse, teachers: dict[str, Path], broken: Any) -> None:
        path = change(teachers["ERM"], tiny.root / "changed" / "model.pkl", provenance=broken)
        assert "has no readable provenance" in refuse(path)


class TestMutations:
    """Whatever happens to a teacher's file: it is refused, or it is the very same teacher; and no code of it runs."""

    N_MUTATIONS = 200

    def mutate(self, path: Path, target: Path, draw: random.Random, hostile: list[Any], copy: Any) -> str:
        whole = path.read_bytes()
        kind = draw.choice(["truncated", "flipped", "overwritten", "hostile", "shapes"])
        if kind == "truncated":
            target.write_bytes(whole[: draw.randrange(len(whole))])
        elif kind == "flipped":
            damaged = bytearray(whole)
            for _ in range(draw.choice([1, 1, 1, 8])):
                damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            target.write_bytes(damaged)
        elif kind == "overwritten":
            start = draw.randrange(len(whole))
            target.write_bytes(whole[:start] + draw.randbytes(draw.randrange(1, 200)) + whole[start:])
        elif kind == "hostile":
            content = checkpoints.load_checkpoint(path) | {"model_dict": {}}
            holder = draw.choice([content, content["args"], content["model_hparams"], content["model_dict"]])
            holder[draw.choice([*holder, "new"])] = draw.choice(hostile)
            copy(path, target, pickle.dumps(content, protocol=draw.choice([2, 4])))
        else:
            content = checkpoints.load_checkpoint(path)
            name = draw.choice([name for name, tensor in content["model_dict"].items() if tensor.dim()])
            tensor = content["model_dict"][name]
            shapes = [tensor[None], tensor.flatten()[:-1], torch.zeros(3, 3), torch.zeros(0)]
            content["model_dict"][name] = draw.choice([shape for shape in shapes if shape.shape != tensor.shape])
            torch.save(content, target)
        return kind

    def test_in_this_process(
        self,
        tiny: Any,
        teachers: dict[str, Path],
        gather_facts: Callable[..., Any],
        every_hostile: list[Any],
        replace_pickle: Callable[..., None],
    ) -> None:
        draw, target = random.Random(0), tiny.root / "model.pkl"
        outcomes: dict[str, list[bool]] = {}
        run = gather_facts()
        right = find_teacher(run, {"teacher": str(teachers["ERM"])})
        for _ in range(self.N_MUTATIONS):
            kind = self.mutate(teachers["ERM"], target, draw, every_hostile, replace_pickle)
            try:
                loaded = find_teacher(run, {"teacher": str(target)})
            except UsageError as error:
                assert str(target) in str(error)
                assert "\n" not in str(error)
                outcomes.setdefault(kind, []).append(True)
                continue
            outcomes.setdefault(kind, []).append(False)
            assert weights.hash_state(loaded.model.state_dict()) == right.facts["sha256"]
            assert loaded.facts["sha256"] == right.facts["sha256"]
            assert loaded.hparams == right.hparams
        assert min(len(refused) for refused in outcomes.values()) > 20
        assert all(all(outcomes[kind]) for kind in ("truncated", "hostile", "shapes"))

    def test_by_the_command(
        self,
        tiny: Any,
        teachers: dict[str, Path],
        refuse: Refuse,
        every_hostile: list[Any],
        replace_pickle: Callable[..., None],
    ) -> None:
        draw, target = random.Random(1), tiny.root / "model.pkl"
        n_refused = 0
        while n_refused < 12:
            kind = self.mutate(teachers["ERM"], target, draw, every_hostile, replace_pickle)
            if kind != "flipped" and kind != "overwritten":
                refuse(target)
                n_refused += 1


class TestAuto:
    def test_two_students_share_one_teacher(self, tiny: Any, records: Callable[..., Any]) -> None:
        first = tiny.train("first", algorithm="KD")
        (store,) = (tiny.root / "teachers").iterdir()
        before = {path.name: path.stat().st_mtime_ns for path in store.iterdir()}
        second = tiny.train("second", {"kd_weight": 0.5}, algorithm="KD", hparams_seed=3)
        assert list((tiny.root / "teachers").iterdir()) == [store]
        assert {path.name: path.stat().st_mtime_ns for path in store.iterdir()} == before
        described = [records(run)[0]["teacher"] for run in (first, second)]
        assert described[0] == described[1]
        assert described[0]["path"] == f"../teachers/{store.name}/model.pkl"

    def test_kd_and_daft_share_their_erm_teacher(self, tiny: Any, records: Callable[..., Any]) -> None:
        kd, daft = (records(tiny.train(name, {"lr": 0.01}, algorithm=name))[0]["teacher"] for name in ("KD", "DAFT"))
        assert daft["algorithm"] == "AFT"
        assert daft["teacher"] == kd
        assert len(list((tiny.root / "teachers").iterdir())) == 2

    def test_the_store_may_be_elsewhere(self, tiny: Any, records: Callable[..., Any]) -> None:
        store = tiny.root / "shared" / "store"
        run = tiny.train("sweep/run", algorithm="DAFT", teachers_dir=str(store))
        assert sorted(path.name[:3] for path in store.iterdir()) == ["AFT", "ERM"]
        described = records(run)[0]["teacher"]
        assert described["path"].startswith("../../shared/store/AFT-")
        assert described["teacher"]["path"].startswith("../../shared/store/ERM-")

    def test_a_teacher_is_an_ordinary_run(self, tiny: Any, outcome: Callable[..., Any]) -> None:
        """The same command by hand gives the same weights: there is one train loop."""
        tiny.train("student", algorithm="KD")
        (store,) = (tiny.root / "teachers").iterdir()
        args = checkpoints.load_checkpoint(store / "model.pkl")["args"]
        flags = {name: args[name] for name in ("seed", "data_seed", "steps", "checkpoint_freq")}
        tiny.train("by_hand", json.loads(args["hparams"]), **flags)
        assert outcome(tiny.root / "by_hand")["model.pkl"] == outcome(store)["model.pkl"]

    def test_an_unfinished_teacher_is_gone_on_with_whoever_asks(
        self, tiny: Any, image_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Seeds that make no data, and values that mean the same, are no other teacher."""
        host = contract.find_host()
        update, calls = host.algorithms.ERM.update, []

        def update_thrice(self: Any, *args: Any) -> Any:
            calls.append(1)
            if len(calls) > 3:
                raise KeyboardInterrupt
            return update(self, *args)

        flags = {"algorithm": "DAFT", "dataset": f"folder:{image_folder}"}
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(host.algorithms.ERM, "update", update_thrice)
            tiny.train("first", FOLDER_HPARAMS, **flags)
        (store,) = (tiny.root / "teachers").glob("ERM-*")
        assert (store / "resume.pt").is_file()
        second = tiny.train("second", {**FOLDER_HPARAMS, "kd_weight": 0.9}, seed=4, **flags)
        assert (second / "done").is_file()
        assert list((tiny.root / "teachers").glob("ERM-*")) == [store]

    @pytest.mark.parametrize("algorithm", ["KD", "DAFT", "AFT"])
    def test_random_states_stay_as_they_were(
        self, gather_facts: Callable[..., Any], teachers: dict[str, Path], algorithm: str
    ) -> None:
        run = gather_facts(algorithm="KD")
        run.output_dir.mkdir()
        wanted = get_defaults(run.host, algorithm, "Debug28", {}) | {"teacher_backbone": "resnet8_w4"}
        given = wanted | {"teacher": str(teachers["AFT" if algorithm == "DAFT" else "ERM"])}
        random.seed(1), np.random.seed(2), torch.manual_seed(3)
        random.random(), np.random.randn(1), torch.randn(1)

        def capture() -> tuple[Any, ...]:
            numpy_state = np.random.get_state()
            assert isinstance(numpy_state, tuple)
            return random.getstate(), numpy_state[1].tolist(), numpy_state[2:], torch.get_rng_state().tolist()

        before = capture()
        for hparams in (given, wanted, wanted):  # loads; trains; finds
            find_teacher(run, hparams, algorithm)
            assert capture() == before

    def test_a_student_that_does_not_listen_is_erm_bit_for_bit(self, tiny: Any) -> None:
        states = [
            checkpoints.load_checkpoint(tiny.train(name, hparams, algorithm=name) / "model.pkl")["model_dict"]
            for name, hparams in (("ERM", {}), ("KD", {"kd_weight": 0}), ("DAFT", {"kd_weight": 0}))
        ]
        assert len({weights.hash_state(state) for state in states}) == 1


class TestPlan:
    def plan(self, algorithm: str = "KD", user: dict[str, Any] | None = None, **changes: Any) -> TeacherJob:
        host = contract.find_host()
        plugin.register(host)
        drawn = changes.pop("drawn", {})
        args = TrainArgs(**{"dataset": "Debug28", "algorithm": algorithm, "steps": 100, **changes})
        user = user or {}
        wanted = get_defaults(host, algorithm, args.dataset, user) | drawn | user
        (slot,) = list_slots(algorithm)
        return plan_teacher(slot, wanted, args, user, host, describe_dataset(host, args.dataset, user))

    @pytest.fixture(autouse=True)
    def clean_up(self, tiny: Any) -> None:
        """Leave the host as it was."""

    @pytest.mark.parametrize(
        ("algorithm", "changes"),
        [
            ("KD", {"steps": 101}),
            ("KD", {"test_envs": [1]}),
            ("KD", {"test_envs": [0, 1]}),
            ("KD", {"trial_seed": 1}),
            ("KD", {"holdout_fraction": 0.3}),
            ("KD", {"uda_holdout_fraction": 0.3}),
            ("KD", {"task": "domain_adaptation"}),
            ("KD", {"seed": 1}),  # Debug28's noise is the seed's
            ("KD", {"dataset": "ColoredDigits"}),
            ("KD", {"precision": "bf16"}),
            ("KD", {"user": {"lr": 0.1}}),
            ("KD", {"user": {"batch_size": 3}}),
            ("KD", {"user": {"teacher_backbone": "resnet8_w3"}}),
            ("KD", {"user": {"teacher_frozen": True}}),
            ("KD", {"user": {"teacher_steps": 50}}),
            ("DAFT", {"user": {"aft_eps": "8/255"}}),
            ("DAFT", {"user": {"aft_eps": 0}}),
            ("DAFT", {"user": {"aft_steps": 7}}),
            ("DAFT", {"user": {"aft_scope": "all"}}),
            ("DAFT", {"user": {"aft_attack": "features"}}),
            ("DAFT", {"user": {"aft_norm": "l2"}}),
            ("DAFT", {"user": {"aft_attack_steps": 4}}),
            ("DAFT", {"user": {"aft_weight": 0.5}}),
            ("DAFT", {"user": {"aft_target_mix": 1}}),
            ("DAFT", {"user": {"aft_target_temperature": 2}}),
            ("DAFT", {"user": {"teacher_backbone": "resnet8_w3"}}),
            ("DAFT", {"user": {"teacher_steps": 50}}),
            ("DAFT", {"user": {"lr": 0.1}}),
            ("DAFT", {"drawn": {"aft_target_mix": 1.0}}),  # random search reaches the adversarial stage
            ("DAFT", {"trial_seed": 1}),
        ],
        ids=str,
    )
    def test_what_makes_another_teacher(self, algorithm: str, changes: dict[str, Any]) -> None:
        assert self.plan(algorithm, **changes).identity != self.plan(algorithm).identity

    @pytest.mark.parametrize(
        ("algorithm", "changes"),
        [
            ("KD", {"user": {"kd_weight": 0.1, "kd_temperature": 9}}),
            ("KD", {"user": {"backbone": "resnet18"}}),
            ("KD", {"user": {"lr": 1e-3}}),  # the default, said aloud
            ("KD", {"drawn": {"lr": 0.5, "batch_size": 3, "kd_weight": 0.2}}),  # a student's random draw
            ("KD", {"data_dir": "/elsewhere"}),
            ("DAFT", {"user": {"kd_weight": 0.1}}),
            ("DAFT", {"user": {"aft_eps": "4/255"}}),
            ("DAFT", {"user": {"aft_eps": 4 / 255}}),
            ("DAFT", {"user": {"aft_norm": "linf", "aft_attack_steps": 3}}),
            ("DAFT", {"user": {"aft_steps": 25}}),
            ("DAFT", {"user": {"teacher_steps": 100}}),
            ("DAFT", {"drawn": {"lr": 0.5, "kd_temperature": 1.0}}),
        ],
        ids=str,
    )
    def test_what_does_not(self, algorithm: str, changes: dict[str, Any]) -> None:
        """Equal teachers have equal arguments, too, so that whoever asks may go on with an unfinished one."""
        here, there = self.plan(algorithm), self.plan(algorithm, **changes)
        assert here.identity == there.identity
        assert replace(here.args, data_dir=None) == replace(there.args, data_dir=None)
        assert here.hparams == there.hparams

    @pytest.mark.parametrize("changes", [{"seed": 1}, {"data_seed": 9}, {"moved": True}], ids=str)
    def test_images_of_files_are_the_same_under_every_seed_and_roof(
        self, image_folder: Path, changes: dict[str, Any], tmp_path: Path
    ) -> None:
        moved = Path(shutil.copytree(image_folder, tmp_path / "elsewhere" / image_folder.name))
        roof = moved if changes.get("moved") else image_folder
        here = self.plan(dataset=f"folder:{image_folder}")
        there = self.plan(dataset=f"folder:{roof}", **{key: value for key, value in changes.items() if key != "moved"})
        assert here.identity == there.identity
        assert here.args.seed == there.args.seed
        assert here.args.data_seed is there.args.data_seed is None

    def test_a_folder_with_other_files_has_another_teacher(self, image_folder: Path) -> None:
        first, second, old = (self.plan(dataset=f"folder:{image_folder}", data_id=known) for known in ("a", "b", None))
        assert len({first.identity, second.identity, old.identity}) == 3

    def test_order_of_held_out_domains_does_not_matter(self) -> None:
        here, there = self.plan(test_envs=[0, 1]), self.plan(test_envs=[1, 0])
        assert here.identity == there.identity
        assert here.args == there.args

    def test_every_random_draw_of_a_student_has_one_erm_teacher(self) -> None:
        host = contract.find_host()
        plugin.register(host)
        draws = [get_random_hparams(host, "KD", describe_dataset(host, "Debug28", {}), seed) for seed in range(5)]
        assert len({draw["lr"] for draw in draws}) == 5
        assert len({self.plan("KD", drawn=draw).identity for draw in draws}) == 1

    def test_the_erm_teacher(self) -> None:
        job = self.plan("KD", {"teacher_backbone": "resnet8_w3", "teacher_weights": "none", "lr": 0.1, "kd_weight": 1})
        assert job.args.algorithm == "ERM"
        assert job.args.steps == 100
        assert job.args.seed == contract.find_host().misc.seed_hash("Debug28", [0], 0)
        assert job.args.data_seed == 0
        assert job.hparams["backbone"] == "resnet8_w3"
        assert job.hparams["weights"] == "none"
        assert job.hparams["lr"] == 0.1
        assert not [name for name in job.hparams if name.startswith(("kd_", "aft_", "teacher"))]

    def test_the_aft_teacher(self) -> None:
        job = self.plan("DAFT", {"teacher_steps": 40, "aft_eps": "auto*2", "aft_weight": 0.5})
        assert job.args.algorithm == "AFT"
        assert job.args.steps == 10
        assert job.hparams["aft_eps"] == 8 / 255
        assert job.hparams["aft_weight"] == 0.5
        assert job.hparams["teacher_steps"] == 40
        assert "backbone" not in job.hparams

    def test_the_chain_ends_at_the_erm_teacher_that_kd_has(self) -> None:
        host = contract.find_host()
        user = {"lr": 0.1, "aft_eps": 0, "teacher_backbone": "resnet8_w3"}
        aft = self.plan("DAFT", user)
        (slot,) = find_method("AFT").slots
        wanted = get_defaults(host, "AFT", "Debug28") | aft.hparams
        erm = plan_teacher(slot, wanted, aft.args, aft.hparams, host, describe_dataset(host, "Debug28", {}))
        assert erm == self.plan("KD", {"lr": 0.1, "teacher_backbone": "resnet8_w3"})

    def test_a_job_has_what_its_run_has_and_nothing_of_its_student(self, tmp_path: Path) -> None:
        job = self.plan("KD", precision="bf16", hparams_seed=7, checkpoint_freq=3)
        made = job.place(tmp_path)
        assert made.algorithm == "ERM"
        assert made.hparams_seed == 0
        assert made.checkpoint_freq is None
        assert made.precision == "bf16"
        assert made.output_dir == str(tmp_path / job.identity)
        assert made.teachers_dir == str(tmp_path)
        assert json.loads(made.hparams or "") == job.hparams


class TestRecord:
    def test_says_what_the_teachers_own_records_say(self, tiny: Any, records: Callable[..., Any]) -> None:
        run = tiny.train("student", {"teacher_steps": 5, "aft_steps": 3}, algorithm="DAFT")
        described = [records(run)[0]["teacher"]]
        described.append(described[0]["teacher"])
        for entry, algorithm, steps in zip(described, ("AFT", "ERM"), (3, 5), strict=True):
            folder = (run / entry["path"]).parent
            assert not os.path.isabs(entry["path"])
            last = records(folder)[-1]
            content = checkpoints.load_checkpoint(folder / "model.pkl")
            assert entry["algorithm"] == algorithm
            assert entry["sha256"] == weights.hash_state(content["model_dict"])
            assert entry["steps"] == steps == last["step"] + 1
            assert entry["seconds"] == last["seconds"] > 0
            keys = [f"env{i}_{part}_acc" for i in range(3) for part in ("in", "out")]
            assert entry["accuracies"] == {key: last[key] for key in keys}
        assert all("teacher" not in record for record in records(run)[1:])

    def test_of_a_checkpoint_from_the_middle_of_a_run(self, tiny: Any, records: Callable[..., Any]) -> None:
        path = tiny.make_teacher("ERM", save_model_every_checkpoint=True)
        for name, step in (("model_step2.pkl", 2), ("model_step4.pkl", 4), ("model.pkl", 5)):
            run = tiny.train(name, {"teacher": str(path.with_name(name))}, algorithm="KD", steps=1)
            described = records(run)[0]["teacher"]
            (own,) = [record for record in records(path.parent) if record["step"] == step]
            assert described["steps"] == step + 1
            assert described["accuracies"]["env1_in_acc"] == own["env1_in_acc"]
            content = checkpoints.load_checkpoint(path.with_name(name))
            assert described["sha256"] == weights.hash_state(content["model_dict"])

    def test_of_a_checkpoint_without_its_records(
        self, tiny: Any, records: Callable[..., Any], teachers: dict[str, Path]
    ) -> None:
        moved = tiny.root / "moved.pkl"
        shutil.copy(teachers["AFT"], moved)
        described = records(tiny.train("student", {"teacher": str(moved)}, algorithm="DAFT", steps=1))[0]["teacher"]
        assert described["algorithm"] == "AFT"
        assert described["accuracies"] == {}
        assert "steps" not in described

    def test_a_teacher_is_frozen_and_follows_its_input(
        self, gather_facts: Callable[..., Any], teachers: dict[str, Path]
    ) -> None:
        run = gather_facts()
        made = find_teacher(run, {"teacher": str(teachers["ERM"])})
        before = weights.hash_state(made.model.state_dict())
        made.model.train()
        logits = made(torch.randn(4, 3, 28, 28))
        assert not any(module.training for module in made.model.network.modules())
        assert not any(parameter.requires_grad for parameter in made.model.parameters())
        assert not logits.requires_grad
        assert logits.shape == (4, 2)
        assert weights.hash_state(made.model.state_dict()) == before
        assert isinstance(made, Teacher)
        assert not isinstance(made, torch.nn.Module)
