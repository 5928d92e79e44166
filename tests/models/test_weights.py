from __future__ import annotations

import errno
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from daft_domainbed.errors import UsageError
from daft_domainbed.host.checkpoints import load_checkpoint
from daft_domainbed.models import weights
from daft_domainbed.models.weights import hash_state, load, load_weights, save, to_plain
from daft_domainbed.runtime.files import writing_atomically

CONTENT = {
    "args": {"dataset": "Debug28", "test_envs": [0], "hparams": None},
    "model_input_shape": (3, 28, 28),
    "model_num_classes": 2,
    "model_num_domains": 2,
    "model_hparams": {"lr": 1e-3, "name": "resnet8_w2"},
    "model_dict": {"weight": torch.arange(6.0).view(2, 3), "count": torch.tensor(7)},
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.pkl"
    save(CONTENT, path)
    return path


def assert_refused(path: Path, match: str | None = None, read: Callable[[Path], Any] = load) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


class TestWriting:
    def test_takes_the_name_when_complete(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_text("old")
        with writing_atomically(path) as file:
            file.write(b"new")
            assert path.read_text() == "old"
        assert path.read_text() == "new"
        assert os.listdir(tmp_path) == ["file"]

    @pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
    def test_a_failing_write_leaves_the_old_file_and_nothing_else(self, tmp_path: Path, error: BaseException) -> None:
        path = tmp_path / "file"
        path.write_text("old")
        with pytest.raises(type(error)), writing_atomically(path) as file:
            file.write(b"half")
            raise error
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["file"]

    def test_a_failing_sync_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(descriptor: int) -> None:
            raise OSError(errno.EIO, "input/output error")

        save({"a": 1}, tmp_path / "file")
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="input/output"):
            save({"a": 2}, tmp_path / "file")
        assert load(tmp_path / "file") == {"a": 1}
        assert os.listdir(tmp_path) == ["file"]

    def test_the_errors_of_the_system_name_the_file(self, tmp_path: Path) -> None:
        with pytest.raises(OSError) as caught, writing_atomically(tmp_path / "file"):
            raise OSError(errno.ENOSPC, "full")
        assert caught.value.filename == str(tmp_path / "file")

    def test_what_torch_makes_of_a_full_disk_is_told_apart(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class FullDisk:
            """A file on a disk with room for a few bytes."""

            left = 1000

            def write(self, data: bytes) -> int:
                if self.left < len(data):
                    raise OSError(errno.ENOSPC, "No space left on device")
                self.left -= len(data)
                return len(data)

            def flush(self) -> None:
                pass

            def __enter__(self) -> FullDisk:
                return self

            def __exit__(self, *exc_info: object) -> None:
                pass

        monkeypatch.setattr(Path, "open", lambda self, mode: FullDisk())
        with pytest.raises(OSError) as caught:
            save({"weight": torch.zeros(10_000)}, tmp_path / "file")
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(tmp_path / "file")

    def test_errors_of_torch_itself_stay_what_they_are(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: object) -> None:
            raise RuntimeError("no storage")

        monkeypatch.setattr(torch, "save", fail)
        with pytest.raises(RuntimeError, match="no storage"):
            save({}, tmp_path / "file")
        assert not os.listdir(tmp_path)


class TestLoading:
    def test_gives_back_what_was_saved(self, checkpoint: Path) -> None:
        content = load_checkpoint(checkpoint)
        assert hash_state(content["model_dict"]) == hash_state(CONTENT["model_dict"])
        assert {**content, "model_dict": None} == {**CONTENT, "model_dict": None}

    def test_numpy_scalars_come_back_as_plain_types(self, tmp_path: Path) -> None:
        """Upstream's random hyperparameters are NumPy scalars, which a safe load refuses unless told otherwise."""
        hparams = {
            "lr": np.float64(0.1),
            "batch_size": np.int64(32),
            "flag": np.bool_(True),
            "single": np.float32(0.5),
            "nested": [np.float64(0.25), {"deep": np.int32(3)}],
        }
        torch.save(CONTENT | {"model_hparams": hparams, "args": {"seed": np.int64(5)}}, tmp_path / "model.pkl")
        content = load_checkpoint(tmp_path / "model.pkl")
        expected = {"lr": 0.1, "batch_size": 32, "flag": True, "single": 0.5, "nested": [0.25, {"deep": 3}]}
        assert content["model_hparams"] == expected
        assert {type(value) for value in content["model_hparams"].values()} == {float, int, bool, list}
        assert type(content["args"]["seed"]) is int
        json.dumps(content["model_hparams"])

    def test_a_missing_file(self, tmp_path: Path) -> None:
        assert_refused(tmp_path / "model.pkl", "no checkpoint at")

    def test_a_folder(self, tmp_path: Path) -> None:
        assert_refused(tmp_path, "is a folder: name a checkpoint in it")

    @pytest.mark.parametrize("content", [b"", b"PK", b"no archive", pickle.dumps(CONTENT["args"]), bytes(5000)])
    def test_no_archive(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "model.pkl").write_bytes(content)
        assert_refused(tmp_path / "model.pkl", "not a whole checkpoint")

    def test_an_archive_of_other_things(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "model.pkl", "w") as archive:
            archive.writestr("notes.txt", "no weights")
        assert_refused(tmp_path / "model.pkl")

    def test_the_format_before_archives(self, tmp_path: Path) -> None:
        torch.save(CONTENT, tmp_path / "model.pkl", _use_new_zipfile_serialization=False)
        assert_refused(tmp_path / "model.pkl", r"written before PyTorch 1\.6")

    def test_an_archive_with_a_name_twice(self, checkpoint: Path) -> None:
        with zipfile.ZipFile(checkpoint, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr(archive.namelist()[0], b"other")
        assert_refused(checkpoint, "in it twice")

    def test_what_is_not_a_dictionary(self, tmp_path: Path) -> None:
        torch.save([1, 2], tmp_path / "model.pkl")
        assert_refused(tmp_path / "model.pkl", "holds a list")

    @pytest.mark.parametrize("value", [SimpleNamespace(a=1), Path("x"), {1, 2}, np.arange(3), len], ids=repr)
    def test_objects_beyond_tensors_and_plain_data(self, tmp_path: Path, value: object) -> None:
        torch.save({"value": value}, tmp_path / "model.pkl")
        try:
            content = load(tmp_path / "model.pkl")
        except UsageError as error:
            assert "could run code" in str(error)  # noqa: PT017 - torch may allow more types as time goes by
        else:
            assert content["value"] == value

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_a_pickle_that_would_run_code(
        self, checkpoint: Path, tmp_path: Path, hostile: Any, protocol: int, replace_pickle: Callable[..., None]
    ) -> None:
        path = tmp_path / "hostile.pkl"
        replace_pickle(checkpoint, path, pickle.dumps(CONTENT["args"] | {"x": hostile}, protocol))
        assert_refused(path, "there is no fallback")

    def test_a_bare_pickle_that_would_run_code(self, tmp_path: Path, hostile: Any) -> None:
        (tmp_path / "hostile.pkl").write_bytes(pickle.dumps(hostile))
        assert_refused(tmp_path / "hostile.pkl")

    def test_an_old_file_that_would_run_code(self, tmp_path: Path, hostile: Any) -> None:
        torch.save(hostile, tmp_path / "hostile.pkl", _use_new_zipfile_serialization=False)
        assert_refused(tmp_path / "hostile.pkl")

    def test_truncated_anywhere(self, checkpoint: Path, tmp_path: Path) -> None:
        whole = checkpoint.read_bytes()
        for length in range(0, len(whole), 7):
            (tmp_path / "cut.pkl").write_bytes(whole[:length])
            assert_refused(tmp_path / "cut.pkl")

    def test_any_flipped_bit_is_refused_or_harmless(self, checkpoint: Path, tmp_path: Path) -> None:
        """Most of a small archive is headers, whose damage torch reads in ways of its own."""
        whole, path = checkpoint.read_bytes(), tmp_path / "flipped.pkl"
        wanted = load_checkpoint(checkpoint)
        n_refused = 0
        draw = random.Random(0)
        for _ in range(600):
            damaged = bytearray(whole)
            damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            try:
                content = load_checkpoint(path)
            except UsageError:
                n_refused += 1
                continue
            assert hash_state(content["model_dict"]) == hash_state(wanted["model_dict"])
            assert {**content, "model_dict": None} == {**wanted, "model_dict": None}
        assert n_refused > 100

    def test_a_flipped_bit_of_a_weight(self, checkpoint: Path) -> None:
        """Torch alone loads it without a word."""
        damaged = bytearray(checkpoint.read_bytes())
        damaged[damaged.index(torch.tensor(5.0).numpy().tobytes())] ^= 1
        checkpoint.write_bytes(damaged)
        assert torch.load(checkpoint, weights_only=True)["model_dict"]["weight"][1, 2] != 5
        assert_refused(checkpoint, "CRC")

    def test_an_entry_marked_as_a_folder(self, checkpoint: Path) -> None:
        """Torch alone takes its values from wherever the memory was."""
        with zipfile.ZipFile(checkpoint) as archive:
            start = archive.start_dir
        damaged = bytearray(checkpoint.read_bytes())
        while damaged[start : start + 4] == b"PK\x01\x02":
            damaged[start + 38] |= 0x10  # external attributes: MS-DOS's directory bit
            lengths = damaged[start + 28 : start + 34]
            start += 46 + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2, 4))
        checkpoint.write_bytes(damaged)
        assert hash_state(load_checkpoint(checkpoint)["model_dict"]) == hash_state(CONTENT["model_dict"])


class TestCheckpointKeys:
    @pytest.mark.parametrize("key", CONTENT)
    def test_a_missing_key(self, tmp_path: Path, key: str) -> None:
        save({name: value for name, value in CONTENT.items() if name != key}, tmp_path / "model.pkl")
        assert_refused(tmp_path / "model.pkl", f"lacks {key}", load_checkpoint)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("args", [1]),
            ("args", None),
            ("model_hparams", "lr"),
            ("model_dict", torch.zeros(2)),
            ("model_input_shape", 28),
            ("model_num_classes", 2.0),
            ("model_num_domains", None),
        ],
    )
    def test_a_value_of_the_wrong_kind(self, tmp_path: Path, key: str, value: object) -> None:
        save(CONTENT | {key: value}, tmp_path / "model.pkl")
        assert_refused(tmp_path / "model.pkl", f"{key} is a {type(value).__name__}", load_checkpoint)


class TestWeights:
    STATE = {"conv.weight": torch.arange(4.0), "bn.num_batches_tracked": torch.tensor(3)}

    @pytest.mark.parametrize("content", [STATE, {"state_dict": STATE}])
    def test_a_state_dict_of_torch(self, tmp_path: Path, content: dict[str, Any]) -> None:
        save(content, tmp_path / "weights.pt")
        assert hash_state(load_weights(tmp_path / "weights.pt")) == hash_state(self.STATE)

    def test_a_safetensors_file(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        save_file(self.STATE, tmp_path / "weights.safetensors")
        assert hash_state(load_weights(tmp_path / "weights.safetensors")) == hash_state(self.STATE)

    def test_the_format_before_archives(self, tmp_path: Path) -> None:
        """Published weights are often older than PyTorch 1.6."""
        torch.save(self.STATE, tmp_path / "weights.pt", _use_new_zipfile_serialization=False)
        assert hash_state(load_weights(tmp_path / "weights.pt")) == hash_state(self.STATE)

    def test_an_old_file_that_would_run_code(self, tmp_path: Path, hostile: Any) -> None:
        torch.save({"weight": hostile}, tmp_path / "weights.pt", _use_new_zipfile_serialization=False)
        assert_refused(tmp_path / "weights.pt", "there is no fallback", load_weights)

    def test_a_broken_safetensors_file(self, tmp_path: Path) -> None:
        (tmp_path / "weights.safetensors").write_bytes(b"\xff" * 20)
        assert_refused(tmp_path / "weights.safetensors", "not a whole safetensors file", load_weights)

    @pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
    def test_a_missing_file(self, tmp_path: Path, name: str) -> None:
        assert_refused(tmp_path / name, "check the path", load_weights)

    @pytest.mark.parametrize("content", [{"epoch": 3}, {"state_dict": [1]}, CONTENT])
    def test_more_than_a_state_dict(self, tmp_path: Path, content: dict[str, Any]) -> None:
        save(content, tmp_path / "weights.pt")
        assert_refused(tmp_path / "weights.pt", r"save the backbone's state_dict\(\) alone", load_weights)


class TestHash:
    def test_depends_on_names_types_shapes_and_values(self) -> None:
        states = [
            {"a": torch.zeros(4)},
            {"b": torch.zeros(4)},
            {"a": torch.zeros(2, 2)},
            {"a": torch.zeros(4, dtype=torch.float64)},
            {"a": torch.zeros(4, dtype=torch.int32)},
            {"a": torch.zeros(5)},
            {"a": torch.tensor([0.0, 0.0, 0.0, -0.0])},
            {"a": torch.zeros(0)},
            {"a": torch.tensor(True)},
            {},
        ]
        assert len({hash_state(state) for state in states}) == len(states)

    def test_does_not_depend_on_order_or_layout(self) -> None:
        x = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
        y = x.contiguous(memory_format=torch.channels_last)
        assert y.stride() != x.stride()
        assert hash_state({"x": x, "n": torch.tensor(1)}) == hash_state({"n": torch.tensor(1), "x": y})


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN)
def test_plain_values_stay_what_they_are(value: Any) -> None:
    assert to_plain(value) == value


@given(st.floats(allow_nan=False) | st.integers(-(2**63), 2**63 - 1) | st.booleans())
def test_numpy_scalars_become_plain(value: Any) -> None:
    (plain,) = to_plain((np.asarray(value)[()],))
    assert type(plain) is type(value)
    assert plain == value


def test_module_has_no_way_around_the_safe_load() -> None:
    """A call of torch.load anywhere else, or without its guard, would undo everything above."""
    package = Path(weights.__file__).parents[1]
    calls = [
        (path.name, line)
        for path in package.rglob("*.py")
        for line in path.read_text().splitlines()
        if "torch.load(" in line or "pickle.load" in line
    ]
    assert calls
    assert all(name == "weights.py" and "weights_only=True" in line for name, line in calls)
