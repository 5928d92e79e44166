from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from daft_domainbed.models.generators import CODE_SIZE, CodeEncoder, Generator, Helpers


@pytest.mark.parametrize("side", [28, 32, 40])
@pytest.mark.parametrize("has_code", [False, True])
def test_a_generator_takes_any_size(side: int, has_code: bool) -> None:
    generator = Generator(9, 3, width=4, has_code=has_code)
    code = torch.rand(2, CODE_SIZE) if has_code else None
    assert generator(torch.rand(2, 9, side, side), code).shape == (2, 3, side, side)


def test_a_generators_answer_depends_on_its_code() -> None:
    torch.manual_seed(0)
    generator, x = Generator(3, 3, width=4, has_code=True).eval(), torch.rand(2, 3, 32, 32)
    assert not torch.allclose(generator(x, torch.ones(2, CODE_SIZE)), generator(x, -torch.ones(2, CODE_SIZE)))


@pytest.mark.parametrize("side", [28, 32, 40])
def test_an_encoder_reads_a_code_of_any_size(side: int) -> None:
    mean, spread = CodeEncoder(3)(torch.rand(2, 3, side, side))
    assert mean.shape == spread.shape == (2, CODE_SIZE)


def test_a_generator_has_as_many_weights_as_the_authors() -> None:
    # ResnetGenerator(9, 6, 256, zero_pad, n_blocks=3): convolutions 3 x 3 without bias, shortcuts 1 x 1.
    convolutions = 9 * (9 * 256 + 256 * 512 + 3 * 512 * 512 + 512 * 256 + 256 * 256 + 256 * 6) + 2 * 256 * 512
    norms = 2 * (256 + 3 * 512 + 2 * 512 + 3 * 256)
    assert sum(parameter.numel() for parameter in Generator(9, 6, 256).parameters()) == convolutions + norms


def make_helpers() -> Helpers:
    networks: dict[str, nn.Module] = {"a": nn.Linear(2, 3), "b": nn.Linear(3, 1)}
    return Helpers(networks, lr=0.1, betas={"a": (0.5, 0.9), "b": (0.9, 0.99)})


def take_step(helpers: Helpers, x: torch.Tensor) -> float:
    loss = helpers["b"](helpers["a"](x)).square().mean()
    helpers.optimizer.zero_grad()
    loss.backward()
    helpers.optimizer.step()
    return loss.item()


def test_helpers_go_on_where_their_state_says() -> None:
    torch.manual_seed(0)
    helpers, other, x = make_helpers(), make_helpers(), torch.rand(4, 2)
    for _ in range(3):
        take_step(helpers, x)
    other.load_state_dict(copy.deepcopy(helpers.state_dict()))
    assert [take_step(other, x) for _ in range(3)] == [take_step(helpers, x) for _ in range(3)]
    assert [group["betas"] for group in other.optimizer.param_groups] == [(0.5, 0.9), (0.9, 0.99)]


@pytest.mark.gpu
def test_helpers_follow_their_input() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    helpers, x = make_helpers(), torch.rand(4, 2)
    stays = copy.deepcopy(helpers)
    for part in (helpers, stays):
        take_step(part, x)
    helpers.follow(x.cuda())
    assert take_step(helpers, x.cuda()) == pytest.approx(take_step(stays, x))
