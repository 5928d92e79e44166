"""The simple moving average of weights, against means worked out step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from daft_domainbed import plugin
from daft_domainbed.host import checkpoints, contract
from daft_domainbed.models import weights
from tests.conftest import get_defaults

SHAPE = (3, 32, 32)


@pytest.fixture
def make_sma(tiny: Any) -> Any:
    """Makes an SMA whose network has batch norm."""
    host = contract.find_host()
    plugin.register(host)

    def make(start: int) -> Any:
        wanted = get_defaults(host, "SMA", "EmojiStyles", {}) | {"backbone": "resnet8_w2"}
        torch.manual_seed(0)
        kind = contract.get_algorithm_class(host, "SMA")
        return kind(SHAPE, 4, 1, wanted | {"sma_start": start, "lr": 0.05})

    return make


def take_step(algorithm: Any, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.rand(8, *SHAPE, generator=generator), torch.randint(4, (8,), generator=generator)
    algorithm.train()
    algorithm.update([(x, y)])
    return {name: tensor.detach().clone() for name, tensor in algorithm.network.state_dict().items()}


def test_averages_every_step_from_its_start_on(make_sma: Any) -> None:
    algorithm = make_sma(start=2)
    states = [take_step(algorithm, seed) for seed in range(5)]
    averaged = algorithm.averaged.module.state_dict()
    assert any("running_var" in name for name in averaged)
    for name, tensor in averaged.items():
        if name.endswith("num_batches_tracked"):  # a counter's average is cut to a whole number at every step
            assert 1 <= tensor <= 5
        else:
            mean = torch.stack([state[name].double() for state in states[1:]]).mean(dim=0)
            torch.testing.assert_close(tensor.double(), mean, rtol=1e-5, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in algorithm.averaged.parameters())


@pytest.mark.parametrize("start", [3, 100])
def test_is_the_latest_network_until_then(make_sma: Any, start: int) -> None:
    algorithm = make_sma(start)
    for seed in range(3):
        latest = take_step(algorithm, seed)
        averaged = algorithm.averaged.module.state_dict()
        assert all(torch.equal(averaged[name], tensor) for name, tensor in latest.items())


def test_trains_with_its_network_and_predicts_with_the_mean(make_sma: Any) -> None:
    algorithm = make_sma(start=0)
    for seed in range(3):
        take_step(algorithm, seed)
    x = torch.rand(4, *SHAPE)
    algorithm.eval()
    answer = algorithm.predict(x)
    assert torch.equal(answer, algorithm.averaged.module(x))
    assert not torch.equal(answer, algorithm.network(x))


def test_its_network_is_erms_bit_for_bit(tiny: Any) -> None:
    erm, sma = (checkpoints.load_checkpoint(tiny.train(name, algorithm=name) / "model.pkl") for name in ("ERM", "SMA"))
    shared = {name: tensor for name, tensor in sma["model_dict"].items() if name in erm["model_dict"]}
    assert weights.hash_state(shared) == weights.hash_state(erm["model_dict"])
    assert any(name.startswith("averaged.") for name in sma["model_dict"])


def test_resumes_where_it_was(tiny: Any) -> None:
    def stop(step: int, n_steps: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    flags = {"hparams": {"sma_start": 1}, "algorithm": "SMA", "steps": 6, "checkpoint_freq": 1}
    whole = checkpoints.load_checkpoint(tiny.train("whole", **flags) / "model.pkl")
    with pytest.raises(KeyboardInterrupt):
        tiny.train("cut", **flags, on_step=stop)
    cut = checkpoints.load_checkpoint(tiny.train("cut", **flags) / "model.pkl")
    assert weights.hash_state(cut["model_dict"]) == weights.hash_state(whole["model_dict"])
    assert cut["model_dict"]["averaged.n_averaged"] == 6
