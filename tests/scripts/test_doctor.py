from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from daft_domainbed.errors import UsageError
from daft_domainbed.host import contract
from daft_domainbed.scripts import doctor


@pytest.fixture(autouse=True)
def no_upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the outcome not depend on whether this machine has a clone of DomainBed."""
    monkeypatch.delenv("DOMAINBED_ROOT", raising=False)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "domainbed" else find_spec(name))


def hide_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_version = importlib.metadata.version

    def version(wanted: str) -> str:
        if wanted == name:
            raise importlib.metadata.PackageNotFoundError(name)
        return find_version(wanted)

    monkeypatch.setattr(importlib.metadata, "version", version)


def make_domains(folder: Path, domains: dict[str, list[str]]) -> None:
    for domain, classes in domains.items():
        (folder / domain).mkdir(parents=True)
        for name in classes:
            (folder / domain / name).mkdir()


def test_reports_a_working_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert f"ok       torch: {importlib.metadata.version('torch')}\n" in out
    assert "ok       EmojiStyles: 4 domains, 3136 images\n" in out
    assert "ok       ColoredDigits: 3 domains, 1797 images\n" in out
    assert "missing  clone: DOMAINBED_ROOT is not set" in out
    assert "-> git clone https://github.com/facebookresearch/DomainBed" in out
    assert out.endswith("The embedded host can run.\n")


def test_json_holds_the_same_findings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert doctor.main(["--format", "json", "--data_dir", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == 1
    assert report["ok"] is True
    assert {check["section"] for check in report["checks"]} >= {"versions", "machine", "embedded host", "data"}
    # Whatever is not ok comes with what mends it.
    assert all(bool(check["fix"]) == (check["status"] != "ok") for check in report["checks"])


def test_core_packages_are_those_that_setup_declares() -> None:
    requirements = importlib.metadata.requires("daft-domainbed") or []
    core = {re.split(r"[<>=!~ ;]", line)[0] for line in requirements if "extra ==" not in line}
    upstream = {re.split(r"[<>=!~ ;]", line)[0] for line in requirements if re.search("extra == .upstream", line)}
    assert core == set(doctor.CORE_PACKAGES)
    assert upstream == set(doctor.UPSTREAM_PACKAGES)


def test_missing_package_is_essential_and_stops_the_host_checks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hide_package("torchvision", monkeypatch)
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert f"missing  torchvision: not installed\n           -> {sys.executable} -m pip install" in out
    assert "--upgrade torch torchvision\n" in out
    assert "EmojiStyles" not in out
    assert out.endswith("To mend first: torchvision.\n")


def test_torch_and_torchvision_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def nms(*args: object) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(torchvision.ops, "nms", nms)
    (check,) = doctor.check_torch()
    assert (check.status, check.essential) == ("broken", True)
    assert check.detail == "RuntimeError: operator torchvision::nms does not exist"
    assert check.fix.endswith("torch torchvision")


def test_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    card = SimpleNamespace(name="Card", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    assert [check.detail for check in doctor.check_torch() if check.name == "GPU"] == ["2 x Card, 80 GiB"]


def test_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidiactl")
    (check,) = [check for check in doctor.check_torch() if check.name == "GPU"]
    assert check.status == "broken"
    assert not check.essential
    assert check.fix.endswith("torch torchvision")


def test_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(**kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    (check,) = doctor.find_essential_problems(list(doctor.check_machine(tmp_path)))
    assert (check.name, check.detail) == ("folder", f"{tmp_path}: Permission denied")


def test_disk_that_is_nearly_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**27))
    (check,) = doctor.find_essential_problems(list(doctor.check_machine(tmp_path)))
    assert (check.name, check.detail) == ("free disk", "0.12 GiB, a run wants 0.5 GiB")


def test_embedded_host_that_does_not_import(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find_host(name: str) -> None:
        raise ImportError(f"no module {name}")

    monkeypatch.setattr(contract, "find_host", find_host)
    assert doctor.main([]) == 1
    assert "broken   modules: ImportError: no module embedded\n" in capsys.readouterr().out


def test_embedded_images_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_dataset_class(name: str) -> None:
        raise OSError(f"broken sheet of {name}")

    monkeypatch.setattr(contract.find_host("embedded").datasets, "get_dataset_class", get_dataset_class)
    problems = doctor.find_essential_problems(list(doctor.check_embedded()))
    assert [(check.name, check.status) for check in problems] == [
        ("EmojiStyles", "broken"),
        ("ColoredDigits", "broken"),
    ]
    assert problems[0].detail == "OSError: broken sheet of EmojiStyles"


@pytest.mark.parametrize(("is_clone", "start"), [(True, "git -C "), (False, "install the package again")])
def test_lost_files_come_back_from_where_the_package_came(
    is_clone: bool, start: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if is_clone:
        (tmp_path / ".git").mkdir()
    monkeypatch.setattr(doctor.daft_domainbed, "__file__", str(tmp_path / "daft_domainbed" / "__init__.py"))
    assert doctor._find_reinstallation().startswith(start)


def test_upstream_root_that_is_no_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOMAINBED_ROOT", str(tmp_path))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    *packages, clone = doctor.check_upstream()
    assert [package.status for package in packages] == ["ok", "ok", "ok"]
    assert clone.status == "broken"
    assert str(tmp_path) in clone.detail
    assert clone.fix == doctor.UPSTREAM_CLONE


def test_upstream_without_a_package_it_imports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOMAINBED_ROOT", str(tmp_path))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    hide_package("wilds", monkeypatch)
    clone = list(doctor.check_upstream())[-1]
    assert clone.fix.endswith("pip install --upgrade wilds")


@pytest.mark.parametrize(
    ("commit", "described"),
    [
        (doctor.UPSTREAM_COMMIT, "commit b93c22a"),
        ("0123456789", "commit 0123456 (written for b93c22a)"),
        (None, "commit unknown (written for b93c22a)"),
    ],
)
def test_upstream_clone_is_described_by_its_commit(
    commit: str | None, described: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(command: list[str], **kwargs: object) -> SimpleNamespace:
        assert command[:3] == ["git", "-C", str(tmp_path)]
        if commit is None:
            raise subprocess.CalledProcessError(128, command)
        return SimpleNamespace(stdout=f"{commit}\n")

    monkeypatch.setenv("DOMAINBED_ROOT", str(tmp_path))
    algorithms = SimpleNamespace(__file__=str(tmp_path / "domainbed" / "algorithms.py"))
    monkeypatch.setattr(contract, "find_host", lambda name: SimpleNamespace(algorithms=algorithms))
    monkeypatch.setattr(subprocess, "run", run)
    clone = list(doctor.check_upstream())[-1]
    assert (clone.status, clone.detail) == ("ok", f"{tmp_path}, {described}")


def test_data_folders_that_are_there(tmp_path: Path) -> None:
    make_domains(tmp_path / "PACS", {domain: ["dog", "house"] for domain in "ACPS"})
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").touch()
    found = {check.name: check for check in doctor.check_data(tmp_path)}
    assert found["PACS"].detail == f"{tmp_path / 'PACS'}, 4 domains, 2 classes"
    assert [name for name, check in found.items() if check.status == "ok"] == ["RotatedMNIST, ColoredMNIST", "PACS"]
    assert found["DomainNet"].fix.endswith(
        f"""-c 'from domainbed.scripts.download import download_domain_net; download_domain_net("{tmp_path}")'"""
    )


@pytest.mark.parametrize(
    ("domains", "detail"),
    [
        ({"A": ["dog"], "C": ["dog"]}, "PACS has 2 domains where 4 belong: A, C"),
        (
            {"A": ["cat", "dog"], "C": ["cat", "dog"], "P": ["dog"], "S": ["cat", "dog"]},
            "P lacks the class 'cat' (1 in all)",
        ),
    ],
)
def test_data_folder_that_is_not_whole(domains: dict[str, list[str]], detail: str, tmp_path: Path) -> None:
    make_domains(tmp_path / "PACS", domains)
    (check,) = [check for check in doctor.check_data(tmp_path) if check.name == "PACS"]
    assert check.status == "broken"
    assert check.detail.endswith(detail)
    assert "download_pacs" in check.fix


def test_mnist_that_lacks_a_file(tmp_path: Path) -> None:
    check = next(iter(doctor.check_data(tmp_path)))
    assert check.status == "missing"
    assert check.detail.endswith("no train-images, train-labels, t10k-images, t10k-labels")
    assert f'MNIST("{tmp_path}", download=True)' in check.fix


def test_data_dir_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--data_dir '.*nowhere' is not a folder"):
        doctor.main(["--data_dir", str(tmp_path / "nowhere")])
