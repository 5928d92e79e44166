from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from daft_domainbed.arguments import name_dataset
from daft_domainbed.teachers import provenance
from daft_domainbed.teachers.facts import get_run_facts, run_in_progress
from daft_domainbed.teachers.provenance import PLAIN_FIELDS, compare, describe, fingerprint
from daft_domainbed.teachers.verify import rebuild_provenance

OURS = {
    "dataset": "Debug28",
    "test_envs": [0],
    "trial_seed": 0,
    "holdout_fraction": 0.2,
    "task": "domain_generalization",
    "uda_holdout_fraction": 0.0,
    "leave_out_classes": ["1"],
    "num_classes": 2,
    "input_shape": [3, 28, 28],
    "fingerprints": {"env0_in": "a" * 64, "env0_out": "b" * 64},
}


def make_split(data: Any, keys: list[int]) -> Any:
    return SimpleNamespace(underlying_dataset=data, keys=keys)


def make_tensors(n: int = 6) -> SimpleNamespace:
    return SimpleNamespace(tensors=(torch.arange(n * 4.0).view(n, 4), torch.arange(n)))


class TestCompare:
    def test_equal(self) -> None:
        assert compare(OURS, OURS) == []
        assert compare(OURS | {"more": 1}, OURS) == []

    @given(st.sets(st.sampled_from(PLAIN_FIELDS[1:]), min_size=1), st.booleans())
    def test_names_each_field_with_both_values_plain_ones_first(self, fields: set[str], other_print: bool) -> None:
        theirs = OURS | dict.fromkeys(fields, "other")
        if other_print:
            theirs["fingerprints"] = {"env0_in": "c" * 64, "env0_out": "b" * 64}
        expected = [f"{name} is other there and {OURS[name]} here" for name in PLAIN_FIELDS if name in fields]
        if other_print:
            expected.append(f"the data of env0_in have fingerprint {'c' * 12} there and {'a' * 12} here")
        assert compare(theirs, OURS) == expected

    def test_the_fingerprints_of_another_data_set_say_nothing(self) -> None:
        theirs = OURS | {"dataset": "PACS", "num_classes": 7, "fingerprints": {}}
        assert compare(theirs, OURS) == ["dataset is PACS there and Debug28 here", "num_classes is 7 there and 2 here"]

    @pytest.mark.parametrize("prints", [{}, {"env0_in": "a" * 64}, None])
    def test_a_missing_fingerprint_is_a_difference(self, prints: dict[str, str] | None) -> None:
        assert "the data of env0_out have fingerprint None there" in compare(OURS | {"fingerprints": prints}, OURS)[-1]

    @pytest.mark.parametrize("name", PLAIN_FIELDS)
    def test_a_missing_field_is_a_difference(self, name: str) -> None:
        theirs = {key: value for key, value in OURS.items() if key != name}
        assert compare(theirs, OURS) == [f"{name} is None there and {OURS[name]} here"]


class TestNameDataset:
    @pytest.mark.parametrize(
        ("dataset", "name"),
        [
            ("PACS", "PACS"),
            ("folder:/data/birds", "folder:birds"),
            ("folder:/data/birds/", "folder:birds"),
            ("folder:birds", "folder:birds"),
            ("folder:/other/place/birds", "folder:birds"),
        ],
    )
    def test_does_not_say_where(self, dataset: str, name: str) -> None:
        assert name_dataset(dataset) == name

    def test_a_relative_path_is_followed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "birds").mkdir()
        monkeypatch.chdir(tmp_path / "birds")
        assert name_dataset("folder:.") == "folder:birds"


class TestFingerprintOfTensors:
    def test_is_the_hash_of_images_and_labels(self) -> None:
        data = make_tensors()
        images, labels = (tensor.numpy()[[4, 1]] for tensor in data.tensors)
        expected = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        assert fingerprint(make_split(data, [4, 1])) == expected

    def test_does_not_depend_on_how_many_are_hashed_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        split = make_split(make_tensors(11), list(range(11)))
        whole = fingerprint(split)
        monkeypatch.setattr(provenance, "_SAMPLES_AT_ONCE", 3)
        assert fingerprint(split) == whole

    def test_depends_on_images_labels_membership_and_order(self) -> None:
        data, other_image, other_label = make_tensors(), make_tensors(), make_tensors()
        other_image.tensors[0][2, 1] += 1
        other_label.tensors[1][2] += 1
        splits = [(source, [0, 1, 2]) for source in (data, other_image, other_label)]
        splits += [(data, [0, 2, 1]), (data, [0, 1])]
        assert len({fingerprint(make_split(*split)) for split in splits}) == len(splits)

    def test_does_not_depend_on_the_label_type_or_on_what_is_left_out(self) -> None:
        data, other = make_tensors(), make_tensors()
        other.tensors = (other.tensors[0].clone(), other.tensors[1].to(torch.uint8))
        other.tensors[0][5] = -1
        assert fingerprint(make_split(data, [0, 1])) == fingerprint(make_split(other, [0, 1]))

    def test_uses_what_identifies_samples_where_augmentation_would_not(self) -> None:
        data = SimpleNamespace(raw=lambda indices: (indices.to(torch.uint8), indices))
        expected = hashlib.sha256(bytes([3, 1]) + torch.tensor([3, 1]).numpy().tobytes()).hexdigest()
        assert fingerprint(make_split(data, [3, 1])) == expected


class TestFingerprintOfFolders:
    def make_split(self, root: Path, sizes: dict[str, int]) -> Any:
        samples = []
        for name, size in sizes.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(size))
            samples.append((str(path), name.startswith("dog") * 1))
        return make_split(SimpleNamespace(root=str(root), samples=samples), list(range(len(samples))))

    def test_is_the_hash_of_names_sizes_and_classes(self, tmp_path: Path) -> None:
        split = self.make_split(tmp_path, {"dog/1.png": 10, "cat/2.png": 20})
        assert fingerprint(split) == hashlib.sha256(b"dog/1.png 10 1\ncat/2.png 20 0\n").hexdigest()

    def test_does_not_depend_on_place_and_time(self, tmp_path: Path) -> None:
        here = self.make_split(tmp_path / "here", {"dog/1.png": 10})
        there = self.make_split(tmp_path / "there", {"dog/1.png": 10})
        os.utime(tmp_path / "there" / "dog" / "1.png", (0, 0))
        assert fingerprint(here) == fingerprint(there)

    def test_depends_on_names_sizes_and_order(self, tmp_path: Path) -> None:
        contents = [
            {"dog/1.png": 10, "cat/2.png": 20},
            {"dog/1.png": 11, "cat/2.png": 20},
            {"dog/3.png": 10, "cat/2.png": 20},
            {"dog/1.png": 10, "dog/2.png": 20},
            {"cat/2.png": 20, "dog/1.png": 10},
            {"dog/1.png": 10},
        ]
        splits = [self.make_split(tmp_path / str(i), sizes) for i, sizes in enumerate(contents)]
        assert len({fingerprint(split) for split in splits}) == len(splits)


def test_fingerprint_of_anything_else_is_of_its_indices() -> None:
    splits = [("abcd", [0, 1]), ("abcd", [1, 0]), ("abc", [0, 1]), (b"abcd", [0, 1])]
    assert len({fingerprint(make_split(*split)) for split in splits}) == len(splits)
    assert fingerprint(make_split("abcd", [0, 1])) == fingerprint(make_split("efgh", [0, 1]))


class TestRuns:
    def test_a_run_describes_itself(self, gather_facts: Callable[..., Any]) -> None:
        facts = gather_facts(test_envs=[2, 0], trial_seed=3)
        described = facts.provenance
        assert described == describe(facts.args, 2, (3, 28, 28), facts.splits)
        assert {name: described[name] for name in PLAIN_FIELDS} == {
            "dataset": "Debug28",
            "test_envs": [0, 2],
            "trial_seed": 3,
            "holdout_fraction": 0.2,
            "task": "domain_generalization",
            "uda_holdout_fraction": 0.0,
            "leave_out_classes": None,
            "num_classes": 2,
            "input_shape": [3, 28, 28],
        }
        assert list(described["fingerprints"]) == [f"env{i}_{part}" for i in range(3) for part in ("in", "out")]
        assert len(set(described["fingerprints"].values())) == 6

    @pytest.mark.parametrize(
        ("flags", "is_same"),
        [
            ({"algorithm": "DAFT"}, True),
            ({"steps": 9}, True),
            ({"seed": 1}, False),  # the data of Debug sets do
            ({"trial_seed": 1}, False),
            ({"holdout_fraction": 0.5}, False),
        ],
        ids=str,
    )
    def test_what_the_data_depend_on(
        self, gather_facts: Callable[..., Any], flags: dict[str, Any], is_same: bool
    ) -> None:
        here, there = (gather_facts(**f).provenance["fingerprints"] for f in ({}, flags))
        if is_same:
            assert here == there
        else:
            assert not set(here.values()) & set(there.values())

    def test_unlabelled_images_leave_the_split_of_the_held_out_domain(self, gather_facts: Callable[..., Any]) -> None:
        here, there = (
            gather_facts(uda_holdout_fraction=f, hparams={"batch_size": 4}).provenance["fingerprints"]
            for f in (0.0, 0.5)
        )
        assert [name for name in here if here[name] != there[name]] == ["env0_in"]

    def test_the_data_of_a_teacher_are_those_of_its_student(self, gather_facts: Callable[..., Any]) -> None:
        assert (
            gather_facts(seed=7, data_seed=3).provenance["fingerprints"]
            == gather_facts(seed=3).provenance["fingerprints"]
        )

    def test_rebuilding_gives_a_run_its_own_provenance(self, gather_facts: Callable[..., Any]) -> None:
        flags = {"test_envs": [1], "trial_seed": 2, "seed": 3, "holdout_fraction": 0.3, "uda_holdout_fraction": 0.5}
        args = {**flags, "task": "domain_generalization"}
        own, facts = gather_facts(**flags, hparams={"batch_size": 4}).provenance, gather_facts()
        before = torch.get_rng_state()
        assert rebuild_provenance(args, facts) == own
        assert rebuild_provenance({**args, "seed": 4}, facts) != own
        assert torch.equal(torch.get_rng_state(), before)

    def test_runs_nest(self, gather_facts: Callable[..., Any]) -> None:
        outer = gather_facts()
        inner = replace(outer, output_dir=Path("inner"))
        assert get_run_facts() is None
        with run_in_progress(outer):
            with pytest.raises(KeyError), run_in_progress(inner):
                assert get_run_facts() is inner
                raise KeyError
            assert get_run_facts() is outer
        assert get_run_facts() is None
