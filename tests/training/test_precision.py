from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.errors import UsageError
from daft_domainbed.functional.attacks import run_pgd
from daft_domainbed.models import weights
from daft_domainbed.training import resume
from daft_domainbed.training.engine import train
from daft_domainbed.training.loss_scaler import LossScaler
from daft_domainbed.training.precision import Precision, check_precision

CPU = torch.device("cpu")


class Learner(nn.Module):
    """An algorithm that knows nothing of precision."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = nn.Linear(4, 1)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=0.1)
        self.last = torch.optim.SGD(self.network.parameters(), lr=0.1)
        self.gradient: Tensor | None = None

    def update(self, factor: float = 1.0) -> float:
        x = torch.arange(8.0).view(2, 4)
        loss = (self.network(x) ** 2).mean() * factor
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.gradient = self.network.weight.grad.clone()
        return loss.item()


class Convolving(nn.Module):
    """An algorithm with images."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3))
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=0.01)

    def update(self) -> None:
        x = torch.arange(2.0 * 3 * 40 * 40).sin().view(2, 3, 40, 40)
        loss = self.network(x).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def get_weights(learner: Learner) -> list[list[float]]:
    return [parameter.tolist() for parameter in learner.network.parameters()]


# --- autocast ----------------------------------------------------------------------------------------------------


def test_fp32_changes_nothing() -> None:
    learner, x = Learner(), torch.rand(2, 4)
    precision = Precision("fp32", CPU)
    with precision.active():
        assert not torch.is_autocast_enabled("cpu")
        assert torch.equal(learner.network(x), learner.network(x))
        assert learner.network(x).dtype == torch.float32
    assert precision.state_dict() == {}


def test_bf16_computes_in_bf16_and_keeps_its_weights_in_full() -> None:
    learner = Learner()
    precision = Precision("bf16", CPU)
    with precision.active():
        assert learner.network(torch.rand(2, 4)).dtype == torch.bfloat16
        learner.update()
    assert learner.network(torch.rand(2, 4)).dtype == torch.float32
    assert {parameter.dtype for parameter in learner.network.parameters()} == {torch.float32}
    assert precision.state_dict() == {}


@pytest.mark.parametrize(
    ("algorithm", "attack"), [("ERM", None), ("KD", None), ("DAFT", "pixels"), ("DAFT", "features")]
)
def test_bf16_trains_every_stage_on_a_cpu(algorithm: str, attack: str | None, tmp_path: Path) -> None:
    hparams = {"batch_size": 8, "backbone": "resnet8_w2"}
    if algorithm != "ERM":
        hparams |= {"teacher_backbone": "resnet8_w3", "kd_weight": 0.5}
    if algorithm == "DAFT":
        hparams |= {"aft_attack": attack, "aft_weight": 0.5, "aft_steps": 2}
    losses, states = {}, {}
    for precision in ("fp32", "bf16"):
        folder = train(
            TrainArgs(
                dataset="Debug28",
                algorithm=algorithm,
                hparams=json.dumps(hparams),
                steps=3,
                output_dir=str(tmp_path / precision / "run"),
                device="cpu",
                precision=precision,
            ),
            quiet=True,
        )
        records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        losses[precision] = [record["loss"] for record in records]
        states[precision] = torch.load(folder / "model.pkl", weights_only=True)["model_dict"]
    # Three digits of a loss survive in bf16, and not all of them do: it is no fp32 by another name.
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["bf16"] != losses["fp32"]
    assert {value.dtype for value in states["bf16"].values()} == {torch.float32, torch.int64}
    assert all(value.isfinite().all() for value in states["bf16"].values())


@pytest.mark.parametrize(
    ("precision", "is_supported", "is_warned"), [("bf16", False, True), ("bf16", True, False), ("fp32", False, False)]
)
def test_bf16_that_a_cpu_only_imitates_is_warned_of(
    tiny: Any,
    precision: str,
    is_supported: bool,
    is_warned: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: is_supported)
    tiny.train("run", precision=precision)
    assert capsys.readouterr().err.count("this CPU has no instructions for it") == is_warned


def is_channels_last(learner: Convolving) -> bool:
    return learner.network[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("precision", "side", "expected"), [("bf16", 64, True), ("bf16", 32, False), ("fp32", 64, False)]
)
def test_only_large_images_in_fewer_bits_have_another_layout(precision: str, side: int, expected: bool) -> None:
    learner = Convolving()
    weights = copy.deepcopy(learner.state_dict())
    Precision(precision, CPU).prepare(learner, (3, side, side))
    assert is_channels_last(learner) == expected
    assert all(torch.equal(value, weights[name]) for name, value in learner.state_dict().items())


def test_run_in_another_layout_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def make() -> tuple[Precision, Convolving]:
        precision, learner = Precision("bf16", CPU), Convolving()
        precision.prepare(learner, (3, 40, 40))
        return precision, learner

    def learn(precision: Precision, learner: Convolving, steps: int) -> dict[str, Tensor]:
        for _ in range(steps):
            with precision.active():
                learner.update()
        return learner.state_dict()

    whole = learn(*make(), 6)
    run = make()
    learn(*run, 3)
    weights.save({"algorithm": resume.capture(run[1])}, tmp_path / "resume.pt")
    resumed = make()
    resume.restore(resumed[1], weights.load(tmp_path / "resume.pt")["algorithm"])
    assert is_channels_last(resumed[1])
    rest = learn(*resumed, 3)
    assert all(torch.equal(rest[name], value) for name, value in whole.items())


def test_fp16_is_refused_where_nothing_computes_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--precision fp16 runs on CUDA only, and the device is cpu: use bf16 or fp32"):
        check_precision("fp16", CPU)
    with pytest.raises(UsageError, match="--precision fp16 runs on CUDA only"):
        train(TrainArgs(dataset="Debug28", output_dir=str(tmp_path / "run"), device="cpu", precision="fp16"))
    assert not (tmp_path / "run").exists()


def test_other_precisions_are_for_every_device() -> None:
    for device in (CPU, torch.device("cuda")):
        for name in ("fp32", "bf16"):
            check_precision(name, device)
    check_precision("fp16", torch.device("cuda"), "ANDMask")


def test_fp16_is_refused_where_the_scale_would_count() -> None:
    with pytest.raises(UsageError, match="^--precision fp16 scales the loss, and Fishr .*: use bf16 or fp32$"):
        check_precision("fp16", torch.device("cuda"), "Fishr")
    for name in ("fp32", "bf16"):
        check_precision(name, torch.device("cuda"), "Fishr")


def test_bf16_is_refused_for_what_computes_with_numpy() -> None:
    with pytest.raises(
        UsageError, match="^--precision bf16: RSC computes with NumPy, which has no bfloat16: use fp32$"
    ):
        check_precision("bf16", CPU, "RSC")
    check_precision("fp32", CPU, "RSC")


# --- loss scaling ------------------------------------------------------------------------------------------------


def test_scaled_steps_are_the_unscaled_ones() -> None:
    learner, plain = Learner(), Learner()
    scaler = LossScaler()
    for step in range(5):
        with scaler:
            loss = learner.update()
        assert loss == plain.update()
        # The scale is a power of two: dividing by it rounds nothing.
        assert torch.equal(learner.gradient, plain.gradient)
        assert get_weights(learner) == get_weights(plain)
        assert (scaler.scale, scaler.good_steps) == (2.0**16, step + 1)


def test_only_what_is_active_scales() -> None:
    seen: list[float] = []
    x = torch.tensor([2.0], requires_grad=True)
    y = 3 * x
    y.register_hook(lambda gradient: seen.append(gradient.item()))
    scaler = LossScaler()
    scaler.scale = 8.0
    with scaler:
        y.backward()
        assert torch.autograd.grad(3 * x, x)[0].item() == 3
    assert (x.grad.item(), seen) == (3, [8.0])
    (3 * x).backward()
    assert x.grad.item() == 6
    assert scaler.good_steps == 2


@pytest.mark.parametrize("differentiate", ["backward", "grad"])
def test_small_gradients_survive_half_precision_only_when_scaled(differentiate: str) -> None:
    def find_gradient() -> float:
        weight = torch.tensor([1.0], requires_grad=True)
        loss = (weight.half() * 1.0).float().sum() * 1e-9  # its gradient passes through half precision
        if differentiate == "grad":
            return torch.autograd.grad(loss, weight)[0].item()
        loss.backward()
        return weight.grad.item()

    assert find_gradient() == 0
    with LossScaler():
        assert find_gradient() == pytest.approx(1e-9, rel=0.01)


def test_attack_sees_the_gradient_of_a_confident_sample() -> None:
    def attack() -> Tensor:
        return run_pgd(lambda x: 1e-9 * x.half().float().sum(), torch.zeros(1, 4), eps=0.5, norm="linf", steps=1)

    assert torch.equal(attack(), torch.zeros(1, 4))
    with LossScaler():
        assert torch.equal(attack(), torch.full((1, 4), 0.5))


class InHalf(torch.autograd.Function):
    """The identity, whose gradient overflows in half precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (gradient.half() * 1.0).float()


@pytest.mark.parametrize("differentiate", ["backward", "grad"])
def test_an_overflow_halves_the_scale_and_skips_no_step(differentiate: str) -> None:
    weight = torch.tensor([1.0], requires_grad=True)
    scaler = LossScaler()
    scaler.good_steps = 7
    with scaler:
        loss = (16 * InHalf.apply(weight)).sum()
        gradient = torch.autograd.grad(loss, weight)[0] if differentiate == "grad" else None
        if gradient is None:
            loss.backward()
            gradient = weight.grad
    assert gradient.item() == 16
    assert (scaler.scale, scaler.good_steps) == (2.0**11, 1)  # 16 times as much would be infinite in half precision


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_keeps_the_scale_and_its_gradients(factor: float) -> None:
    learner, scaler = Learner(), LossScaler()
    with scaler:
        learner.update(factor)
    assert not learner.gradient.isfinite().any()
    assert (scaler.scale, scaler.good_steps) == (2.0**16, 0)


def test_gradients_that_are_infinite_at_any_scale_end_the_search() -> None:
    weight = torch.tensor([0.0], requires_grad=True)
    scaler = LossScaler()
    with scaler:
        weight.sqrt().sum().backward()
    assert weight.grad.isinf().all()
    assert scaler.scale == scaler.smallest


def test_the_scale_doubles_after_a_run_of_good_gradients() -> None:
    learner, scaler = Learner(), LossScaler()
    scaler.growth_interval = 3
    scales = []
    with scaler:
        for _ in range(7):
            learner.update()
            scales.append(scaler.scale / 2**16)
    assert scales == [1, 1, 2, 2, 2, 4, 4]


# What upstream's algorithms do with gradients, beyond `loss.backward()`.


def mix(learner: Learner, x: Tensor) -> None:
    """As MLDG: gradients of a copy, of autograd.grad and of backward are added up."""
    inner = copy.deepcopy(learner.network)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.01)
    (inner(x) ** 2).mean().backward()
    optimizer.step()
    gradients = torch.autograd.grad((inner(x) ** 2).mean(), inner.parameters())
    learner.optimizer.zero_grad()
    (learner.network(x) ** 2).mean().backward()
    for parameter, ours, gradient in zip(learner.network.parameters(), inner.parameters(), gradients, strict=True):
        parameter.grad.add_(ours.grad + gradient)
    learner.last.step()


def assign(learner: Learner, x: Tensor) -> None:
    """As ANDMask: gradients of autograd.grad are put in place."""
    gradients = torch.autograd.grad((learner.network(x) ** 2).mean(), list(learner.network.parameters()))
    for parameter, gradient in zip(learner.network.parameters(), gradients, strict=True):
        parameter.grad = gradient
    learner.last.step()


def penalise(learner: Learner, x: Tensor) -> None:
    """As IRM: a gradient is a part of the loss, and the optimizer another one than at the start."""
    learner.last = torch.optim.SGD(learner.network.parameters(), lr=0.001)
    dummy = torch.ones((), requires_grad=True)
    loss = (learner.network(x * dummy) ** 2).mean()
    (gradient,) = torch.autograd.grad(loss, dummy, create_graph=True)
    (loss + gradient**2).backward()
    learner.last.step()


def clip(learner: Learner, x: Tensor) -> None:
    (learner.network(x) ** 2).mean().backward()
    torch.nn.utils.clip_grad_norm_(learner.network.parameters(), 0.1)
    learner.last.step()


def accumulate(learner: Learner, x: Tensor) -> None:
    loss = (learner.network(x) ** 2).mean()
    loss.backward(retain_graph=True)
    loss.backward(torch.tensor(2.0), inputs=[learner.network.weight])
    learner.last.step()


@pytest.mark.parametrize("update", [mix, assign, penalise, clip, accumulate])
def test_whatever_is_done_with_gradients_is_done_with_the_losss_own(update: Callable[[Learner, Tensor], None]) -> None:
    learner, plain, x = Learner(), Learner(), torch.arange(8.0).view(2, 4) / 8
    with LossScaler():
        update(learner, x)
    update(plain, x)
    assert get_weights(learner) == get_weights(plain) != get_weights(Learner())


def test_fp16_computes_in_half_precision_near_to_full() -> None:
    learner, plain = Learner(), Learner()
    precision = Precision("fp16", CPU)
    for _ in range(3):
        with precision.active():
            assert learner.network(torch.rand(2, 4)).dtype == torch.float16
            learner.update()
        plain.update()
    torch.testing.assert_close(learner.network.weight, plain.network.weight, rtol=0.01, atol=0.01)


def test_the_scalers_state_survives_a_restart() -> None:
    precision = Precision("fp16", CPU)
    assert precision.state_dict() == {"scale": 2.0**16, "good_steps": 0}
    precision.scaler.scale, precision.scaler.good_steps = 512.0, 7
    restarted = Precision("fp16", CPU)
    restarted.load_state_dict(json.loads(json.dumps(precision.state_dict())))
    assert restarted.state_dict() == {"scale": 512.0, "good_steps": 7}
    restarted.load_state_dict({})  # of a run that had no scaler
    assert restarted.scaler.scale == 512.0
