from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daft_domainbed import hparams, plugin
from daft_domainbed.errors import UsageError
from daft_domainbed.host import contract
from daft_domainbed.hparams import log_uniform, pick, uniform
from daft_domainbed.plugin.defaults import get_default_hparams, get_random_hparams, list_hparams, list_owners
from tests.conftest import get_defaults

OURS = ("ERM", "KD", "DAFT", "AFT", "SMA")
NETWORK = {"backbone", "weights", "backbone_frozen", "backbone_input_size", "pixels"}
TEACHER = {
    "teacher", "teacher_backbone", "teacher_weights", "teacher_frozen", "teacher_input_size", "teacher_steps",
}  # fmt: skip
KD = {"kd_weight", "kd_temperature"}
AFT = {
    "aft_scope", "aft_attack", "aft_norm", "aft_eps", "aft_attack_steps", "aft_weight", "aft_target_mix",
    "aft_target_temperature",
}  # fmt: skip
NAMES = {
    "ERM": NETWORK,
    "KD": NETWORK | TEACHER | KD,
    "DAFT": NETWORK | TEACHER | KD | AFT | {"aft_steps"},
    "AFT": TEACHER | AFT,
    "SMA": NETWORK | {"sma_start"},
}
DEFAULTS = {
    "backbone": "default", "weights": "pretrained", "backbone_frozen": False, "backbone_input_size": "auto",
    "teacher": "auto", "teacher_weights": "pretrained", "teacher_frozen": False, "teacher_input_size": "auto",
    "teacher_steps": "auto",
    "kd_weight": 0.9, "kd_temperature": 4.0,
    "aft_scope": "head", "aft_attack": "pixels", "aft_norm": "auto", "aft_eps": "auto", "aft_attack_steps": "auto",
    "aft_weight": 1.0, "aft_target_mix": 0.5, "aft_target_temperature": 1.0, "aft_steps": "auto", "input_size": 224,
    "sma_start": 100,
}  # fmt: skip
ALL = {name: hparam for algorithm in OURS for name, hparam in list_hparams(algorithm).items()}
SETS = {  # the student's backbone, the ERM teacher's, what a pixel is
    "EmojiStyles": ("resnet8_w8", "resnet8_w32", "unit"),
    "EmojiStylesUnseen": ("resnet8_w8", "resnet8_w32", "unit"),
    "ColoredDigits": ("resnet8_w8", "resnet8_w32", "unit"),
    "ColoredMNIST": ("default", "resnet8_w32", "unit"),
    "RotatedMNIST": ("default", "resnet8_w32", "unit"),
    "Debug28": ("default", "resnet8_w32", "none"),
    "Debug224": ("default", "resnet50", "none"),
    "PACS": ("default", "resnet50", "imagenet"),
    "VLCS": ("default", "resnet50", "imagenet"),
    "OfficeHome": ("default", "resnet50", "imagenet"),
    "TerraIncognita": ("default", "resnet50", "imagenet"),
    "DomainNet": ("default", "resnet50", "imagenet"),
}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> contract.Host:
    """The embedded host, for which any folder is a data set."""
    monkeypatch.setattr("daft_domainbed.embedded.datasets.list_domains", lambda path, **kwargs: ["a", "b", "c"])
    host = contract.find_host()
    plugin.register(host)
    return host


def get_ours(host: contract.Host, algorithm: str, dataset: str, **user: Any) -> dict[str, Any]:
    found = get_defaults(host, algorithm, dataset, user)
    return {name: value for name, value in found.items() if name in ALL}


# --- defaults ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", SETS)
@pytest.mark.parametrize("algorithm", OURS)
def test_defaults_are_the_specified_ones(host: contract.Host, algorithm: str, dataset: str) -> None:
    special = dict(zip(("backbone", "teacher_backbone", "pixels"), SETS[dataset], strict=True))
    expected = {name: special.get(name, DEFAULTS.get(name)) for name in NAMES[algorithm]}
    found = get_ours(host, algorithm, dataset)
    assert found == expected
    assert {name: type(value) for name, value in found.items()} == {n: type(v) for n, v in expected.items()}


@pytest.mark.parametrize(
    ("side", "student", "teacher"),
    [
        (224, "default", "resnet50"),
        (128, "default", "resnet50"),
        (65, "default", "resnet50"),
        (64, "resnet8_w8", "resnet8_w32"),
        (32, "resnet8_w8", "resnet8_w32"),
        (28, "resnet8_w8", "resnet8_w32"),
        (16, "resnet8_w8", "resnet8_w32"),
    ],
)
def test_defaults_of_a_folder_follow_its_input_size(host: contract.Host, side: int, student: str, teacher: str) -> None:
    user = {} if side == 224 else {"input_size": side}
    found = get_ours(host, "KD", "folder:somewhere", **user)
    assert (found["backbone"], found["teacher_backbone"], found["input_size"]) == (student, teacher, 224)
    assert found["pixels"] == "imagenet"
    assert found.keys() == NAMES["KD"] | {"input_size"}


def test_any_algorithm_of_the_host_gets_the_networks_hyperparameters(host: contract.Host) -> None:
    for algorithm in ("IRM", "CORAL"):
        expected = {name: {**DEFAULTS, "pixels": "imagenet"}[name] for name in NETWORK}
        assert get_ours(host, algorithm, "PACS") == expected


def test_unknown_shapes_get_the_large_networks(host: contract.Host) -> None:
    facts = replace(contract.describe_dataset(host, "PACS", {}), name="WILDSCamelyon", input_shape=None)
    assert get_default_hparams(host, "KD", facts)["teacher_backbone"] == "resnet50"


@pytest.mark.parametrize("algorithm", OURS)
def test_the_hosts_own_draws_stay_as_they_were(host: contract.Host, algorithm: str) -> None:
    draws = [host.hparams_registry.random_hparams(algorithm, "ColoredMNIST", seed) for seed in range(5)]
    plugin.unregister(host)
    for seed, draw in enumerate(draws):
        own = host.hparams_registry.random_hparams(algorithm, "ColoredMNIST", seed)
        assert own == {name: draw[name] for name in own}
        assert not own.keys() & ALL.keys()


# --- random draws ------------------------------------------------------------------------------------------------


def draw_many(host: contract.Host, algorithm: str, dataset: str, n: int = 200) -> list[dict[str, Any]]:
    facts = contract.describe_dataset(host, dataset, {})
    return [get_random_hparams(host, algorithm, facts, seed) for seed in range(n)]


def test_random_draws_have_the_specified_ranges(host: contract.Host) -> None:
    draws = draw_many(host, "DAFT", "EmojiStyles")
    defaults = get_defaults(host, "DAFT", "EmojiStyles", {})
    weights = np.array([draw["kd_weight"] for draw in draws])
    assert weights.min() >= 0.5
    assert weights.max() <= 1.0
    assert weights.mean() == pytest.approx(0.75, abs=0.04)  # uniform: standard error 0.01
    seen = {
        name: {draw[name] for draw in draws}
        for name in ("kd_temperature", "aft_eps", "aft_weight", "aft_target_mix", "batch_size")
    }
    sizes = seen.pop("batch_size")
    assert seen == {
        "kd_temperature": {1.0, 2.0, 4.0, 5.0, 10.0},
        "aft_eps": {0.0, "auto*1/4", "auto*1/2", "auto", "auto*2"},
        "aft_weight": {0.5, 1.0},
        "aft_target_mix": {0.0, 0.5, 1.0},
    }
    assert min(sizes) >= 8
    assert max(sizes) < 128
    drawn = {"kd_weight", "kd_temperature", "aft_eps", "aft_weight", "aft_target_mix", "lr", "batch_size"}
    for name in (NAMES["DAFT"] | {"data_augmentation"}) - drawn:
        assert {draw[name] for draw in draws} == {defaults[name]}


@pytest.mark.parametrize("dataset", ["EmojiStyles", "ColoredDigits", "ColoredMNIST", "PACS"])
@pytest.mark.parametrize("algorithm", OURS)
def test_random_draws_are_legal_and_of_plain_types(host: contract.Host, algorithm: str, dataset: str) -> None:
    defaults = get_defaults(host, algorithm, dataset, {})
    for draw in draw_many(host, algorithm, dataset, 20):
        assert draw.keys() == defaults.keys()
        assert {type(value) for value in draw.values()} <= {bool, int, float, str}
        assert hparams.parse_json(json.dumps(draw)) == draw
        hparams.check_values(draw, defaults, ALL)


def test_our_own_draws_are_plain_before_anyone_converts_them() -> None:
    for seed in range(20):
        draws = [hparam.draw(np.random.RandomState(seed)) for hparam in ALL.values() if hparam.draw]
        assert {type(value) for value in draws} <= {bool, int, float, str}


# --- radii -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("auto", 0.1), ("auto*1/2", 0.05), ("auto * 2", 0.2), ("auto*0.25", 0.025), ("4/255", 4 / 255), ("0.5", 0.5),
        (" 1/2 ", 0.5), ("0", 0.0), (0, 0.0), (2, 2.0), (0.25, 0.25), ("1e-3", 1e-3),
    ],
)  # fmt: skip
def test_parse_eps(value: str | float, expected: float) -> None:
    radius = hparams.parse_eps(value, auto=0.1)
    assert radius == pytest.approx(expected, rel=1e-15)
    assert type(radius) is float


# --- values ------------------------------------------------------------------------------------------------------

BAD_VALUES: dict[str, list[Any]] = {
    "backbone": ["", 3, None, [], ["resnet18", 3]],
    "weights": ["", False, [""]],
    "backbone_frozen": [0, "true", None, "stages:0", "stages:", "3", "stages:3 "],
    "backbone_input_size": [0, 7, 224.0, "big", [64, 0], []],
    "pixels": ["raw", 255, None],
    "teacher": ["", 1, {"path": "x"}],
    "teacher_backbone": ["", 18],
    "teacher_weights": [None],
    "teacher_frozen": [1, "false"],
    "teacher_input_size": [1, True, "224"],
    "teacher_lr": [0, -1.0, "fast"],
    "teacher_probe_steps": [-1, 0.5, "auto"],
    "n_views": [-1, 2.0, True, "endless"],
    "lr_schedule": ["linear", 0, None],
    "average_start": [-1, 0.5, "auto", True],
    "probe_steps": [-1, 1.5, True, "never"],
    "teacher_steps": [0, -5, 2.5, True, "Auto", None],
    "kd_weight": [-0.1, 1.01, "0.5", True, None, float("nan"), float("inf")],
    "kd_temperature": [0, -1, "4", False, float("nan"), float("inf")],
    "aft_scope": ["Head", "body", 1, None],
    "aft_attack": ["pixel", ["pixels"]],
    "aft_norm": ["l1", "Linf", 2],
    "aft_eps": [
        -1, "-4/255", "4/0", "auto*", "auto*-1", "auto/2", "car", "", "4/255*2", True, None, [], float("nan"),
        float("inf"), "inf", "nan", "1e400", 10**400,
    ],
    "aft_attack_steps": [-1, 1.5, True, "none"],
    "aft_adversary": ["Image", "style", 1, None],
    "aft_weight": [-1e-9, 1.5, "1", float("nan")],
    "aft_target_mix": [2, -1, None],
    "aft_target_temperature": [0, -1.0, float("inf")],
    "aft_steps": [0, 10.0],
    "sma_start": [-1, 0.5, "auto"],
    "kd_match": [1, "true", None],
    "input_size": [0, 7, 32.0, "224", True],
    "lr": [0, -1e-3, "1e-3", True, float("nan"), float("inf"), None],
    "batch_size": [0, -8, 16.0, "16", True],
    "weight_decay": [-1, float("inf")],
    "resnet_dropout": [-0.1, 1.1],
    "class_balanced": [1, "yes"],
    "nonlinear_classifier": [0, None],
    "data_augmentation": ["True"],
}  # fmt: skip


def test_every_hyperparameter_of_ours_is_here() -> None:
    assert ALL.keys() <= BAD_VALUES.keys()
    assert ALL.keys() == GOOD_VALUES.keys()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_VALUES.items() for value in values])
def test_bad_values_are_refused_by_name(host: contract.Host, name: str, value: Any) -> None:
    dataset = "folder:somewhere" if name == "input_size" else "ColoredDigits"
    algorithm = "SMA" if name == "sma_start" else "DAFT"
    with pytest.raises(UsageError) as caught:
        hparams.check_values({name: value}, dict.fromkeys(ALL) | get_defaults(host, algorithm, dataset, {}), ALL)
    message = str(caught.value)
    assert message.startswith(f"hyperparameter {name} is {json.dumps(value)}: it must be ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("kd_weight", 2, "a number of at least 0 and at most 1"),
        ("kd_temperature", 0, "a number above 0"),
        ("aft_scope", "x", 'one of "head", "all"'),
        ("aft_attack_steps", -1, '"auto" or an integer of at least 0'),
        ("teacher_frozen", 1, 'true, false or a prefix such as "stages:3"'),
        ("batch_size", 0.5, "an integer"),
        ("batch_size", 0, "an integer of at least 1"),
    ],
)
def test_a_refusal_says_what_the_value_should_be(host: contract.Host, name: str, value: Any, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        hparams.check_values({name: value}, get_defaults(host, "DAFT", "ColoredDigits", {}), ALL)
    assert str(caught.value).endswith(f"it must be {hint}")


def test_values_of_other_algorithms_are_left_to_them(host: contract.Host) -> None:
    hparams.check_values({"aft_eps": "nonsense"}, get_defaults(host, "ERM", "ColoredDigits", {}), ALL)


def _radii() -> st.SearchStrategy[Any]:
    fractions = st.tuples(st.integers(0, 99), st.integers(1, 255)).map(lambda pair: f"{pair[0]}/{pair[1]}")
    return st.one_of(st.floats(0, 10), st.just("auto"), fractions, fractions.map(lambda text: f"auto*{text}"))


def _auto_or(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.just("auto") | strategy


_unit = st.floats(0, 1) | st.integers(0, 1)
_positive = st.floats(1e-6, 1e6) | st.integers(1, 100)
_steps = _auto_or(st.integers(1, 10**6))
_texts = st.text(min_size=1)
_parts = st.booleans() | st.integers(1, 99).map("stages:{}".format)
GOOD_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "backbone": _texts | st.lists(_texts, min_size=1), "weights": _texts, "backbone_frozen": _parts,
    "backbone_input_size": _auto_or(st.integers(8, 1024)), "teacher_input_size": _auto_or(st.integers(8, 1024)),
    "pixels": st.sampled_from(["imagenet", "unit", "none"]),
    "teacher": _texts, "teacher_backbone": _texts | st.lists(_texts, min_size=1),
    "teacher_weights": _texts, "teacher_frozen": _parts,
    "n_views": st.integers(0, 10), "lr_schedule": st.sampled_from(["constant", "cosine"]),
    "average_start": st.just("never") | st.integers(0, 100), "probe_steps": st.integers(0, 100),
    "teacher_probe_steps": st.integers(0, 100), "teacher_steps": _steps, "teacher_lr": _auto_or(_positive),
    "kd_weight": _unit, "kd_match": st.booleans(), "kd_temperature": _positive,
    "aft_scope": st.sampled_from(["head", "all"]), "aft_attack": st.sampled_from(["pixels", "features"]),
    "aft_norm": st.sampled_from(["auto", "linf", "l2"]), "aft_eps": _radii(),
    "aft_attack_steps": _auto_or(st.integers(0, 100)), "aft_weight": _unit, "aft_target_mix": _unit,
    "aft_adversary": st.sampled_from(["image", "domain"]),
    "aft_target_temperature": _positive, "aft_steps": _steps, "sma_start": st.integers(0, 1000),
    "input_size": st.integers(8, 1024),
}  # fmt: skip


@settings(max_examples=100)
@given(st.fixed_dictionaries({}, optional=GOOD_VALUES))
def test_good_values_survive_json_and_are_accepted(values: dict[str, Any]) -> None:
    parsed = hparams.parse_json(json.dumps(values))
    assert parsed == values
    assert {name: type(value) for name, value in parsed.items()} == {n: type(v) for n, v in values.items()}
    hparams.check_values(parsed, dict.fromkeys(GOOD_VALUES), ALL)
    if "aft_eps" in parsed:
        assert 0 <= hparams.parse_eps(parsed["aft_eps"], auto=0.5) < float("inf")


# --- names and JSON ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("kd_wieght", "kd_weight"),
        ("temperature", "kd_temperature"),
        ("AFT_EPS", "aft_eps"),
        ("batchsize", "batch_size"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(host: contract.Host, name: str, nearest: str) -> None:
    known = get_defaults(host, "DAFT", "EmojiStyles", {})
    with pytest.raises(UsageError) as caught:
        hparams.check_names([name], known, ["DAFT", "AFT", "ERM"], list_owners)
    assert str(caught.value) == f"no hyperparameter {name!r} of DAFT, AFT, ERM. Did you mean {nearest!r}?"


def test_known_names_pass(host: contract.Host) -> None:
    known = get_defaults(host, "DAFT", "EmojiStyles", {})
    hparams.check_names(known, known, ["DAFT"], list_owners)
    with pytest.raises(UsageError, match="no hyperparameter 'aft_eps' of ERM. It belongs to AFT and DAFT"):
        hparams.check_names(["aft_eps"], get_ours(host, "ERM", "EmojiStyles"), ["ERM"], list_owners)


@pytest.mark.parametrize("text", ["{", "{'lr': 1}", '{"lr": }', "lr=1", '{"lr": 1} x', "[" * 100_000])
def test_text_that_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not JSON") as caught:
        hparams.parse_json(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "kind"), [("[1]", "list"), ("3", "int"), ('"lr"', "str"), ("null", "NoneType")])
def test_json_that_is_no_object_is_refused(text: str, kind: str) -> None:
    with pytest.raises(UsageError, match=f"is a JSON {kind}, not an object"):
        hparams.parse_json(text)


@pytest.mark.parametrize("text", [None, "", "{}"])
def test_no_hyperparameters_are_fine(text: str | None) -> None:
    assert hparams.parse_json(text) == {}


@pytest.mark.parametrize(
    ("draw", "bounds"),
    [(uniform, (1, 0)), (uniform, (0, math.inf)), (log_uniform, (0, 10)), (log_uniform, (2, 1)), (pick, ())],
)
def test_a_draw_from_nothing_is_refused(draw: Any, bounds: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match=f"{draw.__name__}.* draws nothing"):
        draw(*bounds)
