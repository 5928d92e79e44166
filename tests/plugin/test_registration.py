from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torchvision

from daft_domainbed import plugin
from daft_domainbed.errors import UsageError
from daft_domainbed.host import contract
from daft_domainbed.plugin.defaults import get_random_hparams
from tests.conftest import get_defaults
from tests.processes import run_warm


@pytest.fixture
def host() -> Iterator[contract.Host]:
    """The embedded host, with everything of ours."""
    host = contract.find_host("embedded")
    plugin.register(host)
    return host


@pytest.fixture
def no_upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Python in which nobody has imported DomainBed, or can."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "domainbed"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "domainbed", None)
    monkeypatch.delenv("DOMAINBED_ROOT", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    contract.find_host.cache_clear()
    yield
    contract.find_host.cache_clear()


def test_unknown_host_is_refused() -> None:
    with pytest.raises(UsageError, match="no host 'upstraem': use embedded or upstream"):
        contract.find_host("upstraem")


def test_missing_clone_is_answered_with_what_brings_it(no_upstream: None) -> None:
    with pytest.raises(UsageError, match=r"^--host upstream: .*set DOMAINBED_ROOT to a clone .*pip install wilds"):
        contract.find_host("upstream")


def test_wrong_root_is_named(no_upstream: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOMAINBED_ROOT", str(tmp_path))
    with pytest.raises(UsageError, match=f"DOMAINBED_ROOT is {tmp_path}, which is no clone of DomainBed"):
        contract.find_host("upstream")
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("DATF", "Did you mean 'DAFT'"),
        ("IRM", "--host upstream"),  # the nearest registered name would be no help: upstream has just this one
    ],
)
def test_unknown_algorithm_is_answered_with_the_nearest(host: contract.Host, name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"{name}.*{hint}"):
        contract.get_algorithm_class(host, name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("EmojiStlyes", "Did you mean 'EmojiStyles'"),
        ("SVIRO", "--host upstream"),
        ("folder:nowhere", "no folder .*nowhere"),
    ],
)
def test_unknown_data_set_is_answered_with_the_nearest(host: contract.Host, name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"{name.removeprefix('folder:')}.*{hint}|{hint}"):
        contract.get_dataset_class(host, name)


def test_folders_hyperparameters_follow_its_input_size(host: contract.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daft_domainbed.embedded.datasets.list_domains", lambda path, **_: ["a", "b", "c"])
    defaults = get_defaults(host, "KD", "folder:x", {"input_size": 48})
    assert (defaults["lr"], defaults["backbone"], defaults["teacher_backbone"]) == (1e-3, "resnet8_w8", "resnet8_w32")
    defaults = get_defaults(host, "KD", "folder:x", {})
    assert (defaults["lr"], defaults["backbone"], defaults["teacher_backbone"]) == (5e-5, "default", "resnet50")
    draw = get_random_hparams(host, "KD", contract.describe_dataset(host, "folder:x", {"input_size": 48}), seed=4)
    assert 10**-4.5 <= draw["lr"] <= 10**-2.5


def test_importing_the_package_registers_nothing(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import daft_domainbed, daft_domainbed.training.engine, daft_domainbed.algorithms as ours\n"
        "from daft_domainbed.embedded import algorithms as host; print(host.ALGORITHMS)\n"
    )
    result = run_warm([sys.executable, tmp_path / "script.py"])  # where all of that has been imported
    assert result.stdout.strip() == "['ERM']", result.stderr


@pytest.mark.parametrize("own", [{"resnet18": True, "resnet50_augmix": False}, {"resnet18": False}, {}])
def test_the_hosts_own_resnet_downloads_nothing_where_no_weights_are_wanted(own: dict[str, Any]) -> None:
    if own.get("resnet50_augmix", True):
        pytest.importorskip("timm", reason="the host's default at 224 pixels is timm's")
    host = contract.find_host()
    plugin.register(host)
    defaults = get_defaults(host, "ERM", "PACS", {})
    build = torchvision.models.resnet50
    featurizer = host.networks.Featurizer((3, 224, 224), defaults | {"weights": "none"} | own)
    assert featurizer.n_outputs == (512 if own.get("resnet18") else 2048)
    assert torchvision.models.resnet50 is build
