from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from daft_domainbed import plugin
from daft_domainbed.arguments import TrainArgs
from daft_domainbed.engine import train
from daft_domainbed.errors import UsageError
from daft_domainbed.precision import Precision, _LossScaler, check_precision, find_optimizers

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unregistered() -> Iterator[None]:
    """Leave the host as it was, whatever the train loop registered."""
    yield
    plugin.unregister(plugin.find_host())


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


def scale(learner: Learner) -> _LossScaler:
    scaler = _LossScaler()
    scaler.attach(learner.optimizer)
    return scaler


def get_weights(learner: Learner) -> list[list[float]]:
    return [parameter.tolist() for parameter in learner.network.parameters()]


# --- autocast ----------------------------------------------------------------------------------------------------


def test_fp32_changes_nothing() -> None:
    learner, x = Learner(), torch.rand(2, 4)
    precision = Precision("fp32", CPU, learner)
    with precision.active():
        assert not torch.is_autocast_enabled("cpu")
        assert torch.equal(learner.network(x), learner.network(x))
        assert learner.network(x).dtype == torch.float32
    assert precision.state_dict() == {}


def test_bf16_computes_in_bf16_and_keeps_its_weights_in_full() -> None:
    learner = Learner()
    precision = Precision("bf16", CPU, learner)
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
        hparams |= {"teacher_backbone": "resnet8_w3"}
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
    check_precision("fp16", torch.device("cuda"))


def test_optimizers_are_found_by_name() -> None:
    learner = Learner()
    assert find_optimizers(learner) == {"optimizer": learner.optimizer, "last": learner.last}


# --- loss scaling ------------------------------------------------------------------------------------------------


def test_scaled_steps_are_the_unscaled_ones() -> None:
    learner, plain = Learner(), Learner()
    scaler = scale(learner)
    for step in range(5):
        with scaler:
            loss = learner.update()
        assert loss == plain.update()
        # The scale is a power of two: dividing by it rounds nothing.
        assert torch.equal(learner.gradient, plain.gradient)
        assert get_weights(learner) == get_weights(plain)
        assert (scaler.scale, scaler.good_steps) == (2.0**16, step + 1)


def test_backward_is_of_the_scaled_loss_while_it_is_active() -> None:
    x = torch.tensor([2.0], requires_grad=True)
    scaler = _LossScaler()
    scaler.scale = 8.0
    with scaler:
        (3 * x).sum().backward()
    assert x.grad.item() == 24
    x.grad = None
    (3 * x).sum().backward()
    assert x.grad.item() == 3


def test_small_gradients_survive_half_precision_only_when_scaled() -> None:
    def find_gradient(scaler: _LossScaler | None) -> float:
        weight = torch.tensor([1.0], requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=0.0)
        loss = (weight.half() * 1.0).float().sum() * 1e-9  # its gradient passes through half precision
        if scaler is None:
            loss.backward()
        else:
            scaler.attach(optimizer)
            with scaler:
                loss.backward()
                optimizer.step()
        return weight.grad.item()

    assert find_gradient(None) == 0
    assert find_gradient(_LossScaler()) == pytest.approx(1e-9, rel=0.01)


@pytest.mark.parametrize("factor", [float("inf"), float("nan"), 1e34])  # the last overflows once scaled
def test_an_overflow_skips_the_step_and_halves_the_scale(factor: float) -> None:
    learner = Learner()
    scaler = scale(learner)
    with scaler:
        learner.update()
        weights, state = get_weights(learner), copy.deepcopy(learner.optimizer.state_dict())
        learner.update(factor)
    assert get_weights(learner) == weights
    assert str(learner.optimizer.state_dict()) == str(state)
    assert (scaler.scale, scaler.good_steps) == (2.0**15, 0)
    with scaler:
        learner.update()
    assert get_weights(learner) != weights
    assert (scaler.scale, scaler.good_steps) == (2.0**15, 1)


def test_the_scale_doubles_after_a_run_of_good_steps() -> None:
    learner = Learner()
    scaler = scale(learner)
    scaler.growth_interval = 3
    scales = []
    with scaler:
        for _ in range(7):
            learner.update()
            scales.append(scaler.scale / 2**16)
    assert scales == [1, 1, 2, 2, 2, 4, 4]


def test_the_scalers_state_survives_a_restart() -> None:
    precision = Precision("fp16", CPU, Learner())
    assert precision.state_dict() == {"scale": 2.0**16, "good_steps": 0}
    precision.scaler.scale, precision.scaler.good_steps = 512.0, 7
    restarted = Precision("fp16", CPU, Learner())
    restarted.load_state_dict(json.loads(json.dumps(precision.state_dict())))
    assert restarted.state_dict() == {"scale": 512.0, "good_steps": 7}
    restarted.load_state_dict({})  # of a run that had no scaler
    assert restarted.scaler.scale == 512.0


def test_fp16_attaches_every_optimizer() -> None:
    learner = Learner()
    precision = Precision("fp16", CPU, learner)
    for optimizer in (learner.optimizer, learner.last):
        learner.network.weight.grad = torch.full_like(learner.network.weight, 2.0**16)
        optimizer.step()
        assert torch.equal(learner.network.weight.grad, torch.ones_like(learner.network.weight))
    assert precision.scaler.good_steps == 2


def test_a_step_without_any_gradient_is_no_overflow() -> None:
    learner = Learner()
    scaler = scale(learner)
    weights = get_weights(learner)
    learner.optimizer.step()
    assert get_weights(learner) == weights
    assert scaler.scale == 2.0**16
