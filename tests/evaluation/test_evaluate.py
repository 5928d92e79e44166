from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

from daft_domainbed.evaluation import evaluate as protocol
from daft_domainbed.evaluation import subject as subjects
from daft_domainbed.evaluation.evaluate import EvaluateArgs, evaluate
from daft_domainbed.evaluation.outside import find_outside
from daft_domainbed.evaluation.suites import SUITES, Suite
from daft_domainbed.host.checkpoints import load_checkpoint
from tests.evaluation.conftest import ENVS, run_evaluate
from tests.processes import WarmPopen, wait_until

pytestmark = pytest.mark.usefixtures("small_suites")
KEYS = [
    *("checkpoint", "algorithm", "dataset", "test_envs", "environments", "n_examples", "seed", "suite", "clean"),
    *("worst_class", "curves", "attacks", "corruptions", "calibration", "ood", "fidelity", "flags", "skipped", "cost"),
]


@pytest.fixture
def judge(trained: dict[str, Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Evaluates one of them in a folder of the test's own."""

    def run(name: str = "kd", folder: str = "out", **options: Any) -> dict[str, Any]:
        args = EvaluateArgs([str(trained[name])], output_dir=str(tmp_path / folder), device="cpu", **options)
        return evaluate(args)[0]

    return run


def drop_cost(model: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model.items() if key != "cost"}


# --- the contract ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", ["quick", "standard"])
def test_the_json_is_the_contracts(judge: Callable[..., dict[str, Any]], tmp_path: Path, suite: str) -> None:
    model = judge(suite=suite)
    assert list(model) == KEYS
    assert json.loads((tmp_path / "out/evaluation.json").read_text()) == json.loads(json.dumps(model, allow_nan=False))
    envs = ENVS
    assert (model["environments"], model["test_envs"], model["algorithm"]) == (envs, [0], "KD")
    assert model["dataset"] == "folder:colours"
    assert list(model["clean"]) == list(model["worst_class"]) == envs
    assert all(model["worst_class"][env] <= model["clean"][env] for env in envs)
    attacks = {"pgd"} if suite == "quick" else {"pgd", "minimal"}
    assert {(c["env"], c["norm"], c["attack"]) for c in model["curves"]} == {
        (env, norm, attack) for env in envs for norm in ("linf", "l2") for attack in attacks
    }
    for curve in model["curves"]:
        assert curve["eps"] == sorted(curve["eps"])
        assert curve["accuracy"] == sorted(curve["accuracy"], reverse=True)
        assert curve["accuracy"][0] == model["clean"][curve["env"]]
    for row in model["attacks"]:
        assert set(row) == {"env", "name", "norm", "eps", "steps", "restarts", "accuracy", "ran"}
        assert row["accuracy"] <= model["clean"][row["env"]]
    assert any(row["name"].startswith("pgd") and row["restarts"] == 2 for row in model["attacks"])
    assert set(model["calibration"]) >= {"ece", "ece_scaled", "temperature", "n_bins"}
    assert set(model["fidelity"]) == {"teacher", "agreement", "kl", "cka", "cosine"}
    assert model["flags"] == []
    if suite == "quick":
        assert model["corruptions"] is None
        assert model["ood"] is None
        assert {"corruptions", "minimal", "square", "autoattack"} <= set(model["skipped"])
    else:
        assert len(model["corruptions"]["by_name"]) == 15
        assert {len(values) for values in model["corruptions"]["by_name"].values()} == {5}
        assert {(row["set"], row["score"]) for row in model["ood"]} >= {("noise", "msp"), ("noise", "energy")}
        assert any(row["name"] == "square" for row in model["attacks"])


def test_every_figure_rests_on_the_examples_that_are_named(
    trained: dict[str, Path], judge: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    from torchmetrics.functional.classification import multiclass_calibration_error

    model = judge(n_examples=8)
    examples = json.loads((tmp_path / "out/examples.json").read_text())
    own = subjects.load_subject(trained["kd"], "", device=torch.device("cpu"))
    all_logits, all_labels = [], []
    for i, env in enumerate(model["environments"]):
        split = (own.data.in_splits if i == 0 else own.data.out_splits)[i]
        assert set(examples[env]) <= set(split.keys)
        assert len(set(examples[env])) == 8
        x, y = default_collate([own.data.dataset[i][position] for position in examples[env]])
        with torch.no_grad():
            logits = own.model.algorithm.predict(x)
        assert model["clean"][env] == pytest.approx(100 * (logits.argmax(1) == y).float().mean().item())
        by_class = [100 * (logits.argmax(1) == y)[y == k].float().mean().item() for k in y.unique()]
        assert model["worst_class"][env] == pytest.approx(min(by_class))
        all_logits.append(logits)
        all_labels.append(y)
    probabilities = F.softmax(torch.cat(all_logits), dim=1)
    theirs = multiclass_calibration_error(probabilities, torch.cat(all_labels), num_classes=3, n_bins=15, norm="l1")
    assert model["calibration"]["ece"] == pytest.approx(theirs.item(), abs=1e-5)


def test_another_seed_chooses_other_examples_and_zero_all(
    judge: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "list_tasks", lambda *args: list_all_tasks(*args)[:1])
    monkeypatch.setattr(protocol._Evaluation, "_build_record", lambda self: {})
    monkeypatch.setattr(protocol, "format_card", str)
    chosen = []
    for seed in (0, 1):
        judge("erm", f"seed{seed}", seed=seed)
        chosen.append(json.loads((tmp_path / f"seed{seed}/examples.json").read_text())["day"])
    assert chosen[0] != chosen[1]
    judge("erm", "all", n_examples=0)
    assert len(json.loads((tmp_path / "all/examples.json").read_text())["night"]) == 9  # a fifth of 48


list_all_tasks = protocol.list_tasks


# --- going on ----------------------------------------------------------------------------------------------------


def test_it_goes_on_wherever_it_was_killed(
    judge: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = drop_cost(judge(suite="quick", ood=["noise"]))
    journal = tmp_path / "out/journal.jsonl"
    text = journal.read_bytes()
    draw = random.Random(0)
    for cut in [0, *sorted(draw.randrange(len(text)) for _ in range(6)), len(text) - 1]:
        journal.write_bytes(text[:cut])
        (tmp_path / "out/evaluation.json").unlink(missing_ok=True)
        assert drop_cost(judge(suite="quick", ood=["noise"])) == whole


@pytest.mark.long
@pytest.mark.slow
def test_kill_9_at_ten_random_moments_changes_nothing(
    trained: dict[str, Path], tmp_path: Path, start_script: Callable[[str], WarmPopen]
) -> None:
    def start(folder: str) -> WarmPopen:
        return start_script(
            "import dataclasses\n"
            "from daft_domainbed.evaluation import evaluate, suites\n"
            "suites.SUITES['quick'] = dataclasses.replace(suites.SUITES['quick'], pgd_steps=10)\n"
            "suites._GRIDS = {'linf': [0, 0.01, 1], 'l2': [0, 0.5, 50]}\n"
            f"evaluate.evaluate(evaluate.EvaluateArgs([{str(trained['kd'])!r}], n_examples=6, ood=['noise'],"
            f" device='cpu', output_dir={str(tmp_path / folder)!r}))\n"
        )

    def has_lines(n_lines: int) -> bool:
        return journal.exists() and journal.read_bytes().count(b"\n") >= n_lines

    draw, journal = random.Random(0), tmp_path / "killed/journal.jsonl"
    for _ in range(10):
        process, n_lines = start("killed"), draw.randrange(1, 20)
        wait_until(lambda process=process, n_lines=n_lines: process.poll() is not None or has_lines(n_lines))
        with suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0, 0.1))
        process.kill()
        process.wait()
    models = []
    for folder in ("killed", "whole"):
        assert start(folder).wait() == 0
        models.append(drop_cost(json.loads((tmp_path / folder / "evaluation.json").read_text())))
    assert models[0] == models[1]


def test_the_same_command_again_asks_nothing(
    judge: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    once = judge()
    silent = [replace(task, ask=None) for task in list_all_tasks(None, SUITES["quick"], [], {}, True)]
    monkeypatch.setattr(protocol, "list_tasks", lambda *args: silent)
    monkeypatch.setattr(protocol.whole, "measure_calibration", None)
    monkeypatch.setattr(protocol.whole, "measure_fidelity", None)
    assert judge() == once


@pytest.mark.parametrize("change", [{"suite": "standard"}, {"seed": 1}, {"n_examples": 3}, {"norm": ["l2"]}], ids=str)
def test_other_settings_in_the_same_folder_are_refused(
    judge: Callable[..., dict[str, Any]], tmp_path: Path, change: dict[str, Any]
) -> None:
    judge()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(protocol.UsageError, match=f"{next(iter(change))}.*--output_dir"):
        judge(**change)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


# --- several at once, and outside images ---------------------------------------------------------------------------


def test_several_are_shown_each_others_examples(trained: dict[str, Path], tmp_path: Path) -> None:
    paths = [str(trained["erm"]), str(trained["kd"])]
    models = evaluate(EvaluateArgs(paths, output_dir=str(tmp_path), suite="standard", device="cpu", norm=["linf"]))
    assert [model["checkpoint"] for model in models] == paths
    names = [{row["name"] for row in model["attacks"] if "transfer" in row["name"]} for model in models]
    assert names == [{"transfer from kd"}, {"transfer from erm"}]
    assert {path.name for path in tmp_path.iterdir()} == {"erm", "kd"}
    assert not any("transfer" in text for model in models for text in model["skipped"])


def test_outside_images_of_every_kind(judge: Callable[..., dict[str, Any]], tmp_path: Path, image_folder: Path) -> None:
    with pytest.raises(protocol.UsageError, match="channels"):
        judge(ood=["ColoredDigits"])
    model = judge(folder="second", ood=["noise", "Debug28", f"folder:{image_folder}"])
    assert list(dict.fromkeys(row["set"] for row in model["ood"])) == ["noise", "Debug28", "folder:pictures"]
    assert "ood" not in model["skipped"]
    for row in model["ood"]:
        assert 0 <= row["auroc"] <= 1
        assert 0 <= row["fpr95"] <= 1


def test_left_out_classes_are_outside(colours: Path, trained: dict[str, Path], tiny: Any, tmp_path: Path) -> None:
    flags = {"dataset": f"folder:{colours}", "steps": 2, "leave_out_classes": ["red"]}
    path = tiny.train("two", {"input_size": 16, "batch_size": 4}, **flags) / "model.pkl"
    content = load_checkpoint(path)
    assert content["model_num_classes"] == 2
    assert content["args"]["leave_out_classes"] == ["red"]

    with pytest.raises(protocol.UsageError, match="leave_out_classes is None there and .* here"):
        tiny.train("kd", {"input_size": 16, "teacher": str(trained["erm"])}, algorithm="KD", **flags)

    def ask(path: Path, name: str) -> list[dict[str, Any]]:
        return evaluate(EvaluateArgs([str(path)], output_dir=str(tmp_path / "ood"), ood=[f"classes:{name}"]))[0]["ood"]

    with pytest.raises(protocol.UsageError, match="green was not left out"):
        ask(path, "green")
    with pytest.raises(protocol.UsageError, match="left out nothing"):
        ask(trained["erm"], "red")
    assert {row["set"] for row in ask(path, "red")} == {"classes:red"}
    own = subjects.load_subject(path, "", device=torch.device("cpu"))
    images = find_outside("classes:red", own, None)
    assert images.size == 16  # of the held-out domain alone
    shown = torch.cat(list(images.load(own, 16, 0)))
    assert (shown.mean((2, 3)).argmax(1) == 0).all()  # reddest, all of them


# --- signs -------------------------------------------------------------------------------------------------------


class Round(torch.autograd.Function):
    """Quantises, with the gradient that quantising has: none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)


WRONGS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "masked_gradients": lambda predict, x: predict(Round.apply(x)),
    "randomness": lambda predict, x: predict(x + 0.1 * torch.randn_like(x)),
    "probabilities": lambda predict, x: F.softmax(predict(x), dim=1),
}


@pytest.mark.parametrize("sign", WRONGS)
def test_dishonest_models_are_told_apart(
    judge: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, sign: str
) -> None:
    load = subjects.load_algorithm

    def spoil(*args: Any) -> Any:
        algorithm = load(*args)
        predict = algorithm.predict
        algorithm.predict = lambda x: WRONGS[sign](predict, x)
        return algorithm

    monkeypatch.setattr(subjects, "load_algorithm", spoil)
    once, again = judge("erm", "once"), judge("erm", "again")
    assert sign in {flag["flag"] for flag in once["flags"]}
    assert drop_cost(once) == drop_cost(again)  # a random one, too


# --- memory ------------------------------------------------------------------------------------------------------


def limit_memory(monkeypatch: pytest.MonkeyPatch, most: int, error: Exception) -> None:
    """Have memory run out in every model that is shown more than so many images at a time."""
    load = subjects.load_algorithm

    def spoil(*args: Any) -> Any:
        algorithm = load(*args)
        predict = algorithm.predict

        def check(x: Tensor) -> Tensor:
            if len(x) > most:
                raise error
            logits: Tensor = predict(x)
            return logits

        algorithm.predict = check
        return algorithm

    monkeypatch.setattr(subjects, "load_algorithm", spoil)


@pytest.mark.parametrize(
    ("error", "suite"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "standard"),
        (RuntimeError("[enforce fail] can't allocate memory"), "quick"),
    ],
)
def test_a_batch_beyond_the_memory_is_taken_in_parts(
    judge: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: Exception,
    suite: str,
) -> None:
    whole = drop_cost(judge("erm", "whole", suite=suite, n_examples=3, norm=["linf"]))
    limit_memory(monkeypatch, 2, error)
    assert drop_cost(judge("erm", "parts", suite=suite, n_examples=3, norm=["linf"])) == whole
    assert "2 images at a time" in capfd.readouterr().err


def test_no_memory_for_one_image_is_said(
    judge: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit_memory(monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(protocol.RunError, match="no memory for one image"):
        judge("erm")
    limit_memory(monkeypatch, 9, RuntimeError("the model's own"))
    with pytest.raises(RuntimeError, match="own"):
        judge("erm", "other", n_examples=16)


# --- bad input -----------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line(
    trained: dict[str, Path],
    colours: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    erm, kd, out = trained["erm"], trained["kd"], ("--output_dir", tmp_path / "out")
    cases: list[tuple[list[Any], str]] = [
        ([], "no checkpoint"),
        ([tmp_path / "lost.pkl"], "lost.pkl"),
        ([erm.parent], "is a folder: name a checkpoint in it, such as"),
        ([erm, kd], "--output_dir"),
        ([erm, "--eps", "high", "--norm", "linf"], "'high'"),
        ([erm, "--eps", "-1", "--norm", "linf"], "above 0"),
        ([erm, "--eps", "8/255"], "--norm"),
        ([erm, "--norm", "l3"], "'l3'"),
        ([erm, "--ood", f"folder:{colours}", *out], "blue, green, red"),
        ([erm, "--ood", "Nonsense", *out], "Nonsense"),
        ([erm, "--ood", f"folder:{tmp_path}/lost", *out], "no such folder"),
        ([erm, "--ood", f"folder:{next(colours.glob('*/red'))}", *out], "the model knows (red)"),
        ([erm, "--ood", "noise", "noise", *out], "two sets are called noise"),
        ([erm, "--suite", "slow", *out], "'slow'"),
    ]
    monkeypatch.setattr("builtins.__import__", hide("pyautoattack"))
    cases.append(([erm, "--suite", "full", *out], "pip install 'daft-domainbed[eval]'"))
    for argv, said in cases:
        status, printed, errors = run_evaluate(capfd, *argv)
        assert (status, printed, len(errors)) == (2, "", 1), argv
        assert said in errors[0]
    assert not (tmp_path / "out").exists()


def hide(module: str) -> Callable[..., Any]:
    """An import that does not find a module."""
    original = __import__

    def find(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == module:
            raise ImportError(f"No module named {name!r}")
        return original(name, *args, **kwargs)

    return find


def test_models_of_other_data_are_refused_together(trained: dict[str, Path], tiny: Any, tmp_path: Path) -> None:
    other = tiny.train("noise") / "model.pkl"
    with pytest.raises(protocol.UsageError, match="data set"):
        evaluate(EvaluateArgs([str(trained["erm"]), str(other)], output_dir=str(tmp_path), device="cpu"))


def test_a_changed_folder_is_refused(tiny: Any, image_folder: Path) -> None:
    run = tiny.train(dataset=f"folder:{image_folder}", hparams={"input_size": 16, "batch_size": 4}, steps=2)
    moved = image_folder.with_name("elsewhere")
    image_folder.rename(moved)
    with pytest.raises(protocol.UsageError, match="pictures"):
        evaluate(EvaluateArgs([str(run / "model.pkl")], device="cpu"))
    moved.rename(image_folder)
    (image_folder / "a/x/0.png").rename(image_folder / "a/x/00.png")
    with pytest.raises(protocol.UsageError, match="other data"):
        evaluate(EvaluateArgs([str(run / "model.pkl")], device="cpu"))


def test_the_card_says_what_the_json_says(
    judge: Callable[..., dict[str, Any]], tmp_path: Path, trained: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    model = judge(suite="standard")
    card = (tmp_path / "out/evaluation.md").read_text()
    assert f"| day (held out) | {model['clean']['day']:.1f} |" in card
    assert "AUROC" in card
    status, printed, _ = run_evaluate(capfd, trained["kd"], "--suite", "standard", "--output_dir", tmp_path / "out")
    assert (status, printed.strip()) == (0, card.strip())


def test_suites_only_grow() -> None:
    assert set(SUITES["quick"].parts) < set(SUITES["standard"].parts) < set(SUITES["full"].parts)
    assert isinstance(SUITES["quick"], Suite)
