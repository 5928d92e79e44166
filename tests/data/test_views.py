from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.data import views as views_module
from daft_domainbed.data.loaders import make_eval_stream, make_stream
from daft_domainbed.data.splits import build_data
from daft_domainbed.data.views import Views
from daft_domainbed.embedded.domains import DrawingsDomain, shift_and_flip
from daft_domainbed.host.contract import find_host
from daft_domainbed.models.weights import load
from daft_domainbed.plugin.registration import register
from daft_domainbed.runtime import stopping
from daft_domainbed.runtime.randomness import seed_everything
from tests.conftest import get_defaults


class Noise:
    """A data set whose images are drawn by all three generators."""

    def __getitem__(self, key: int) -> tuple[Tensor, int]:
        return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item(), key], dtype=torch.float64), key


class Split:
    underlying_dataset, keys = Noise(), [5, 3, 8, 1]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.underlying_dataset[self.keys[index]]


def draw(count: int, n: int, workers: int = 0, seed: int = 0, env: int = 0) -> list[Tensor]:
    seed_everything(0)
    stream = make_stream(Split(), 2, workers, views=Views(count, seed, env))
    return [next(stream)[0] for _ in range(n)]


def collect(batches: list[Tensor]) -> dict[int, set[tuple[float, ...]]]:
    seen: dict[int, set[tuple[float, ...]]] = {}
    for row in torch.cat(batches).tolist():
        seen.setdefault(int(row[3]), set()).add(tuple(row))
    return seen


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("count", [1, 3])
def test_an_image_has_so_many_views_and_no_more(count: int, workers: int) -> None:
    seen = collect(draw(count, 60, workers))
    assert {key: len(views) for key, views in seen.items()} == dict.fromkeys(Split.keys, count)


def test_more_views_than_steps_are_endless_views_drawn_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    many = draw(10**6, 20)
    assert sum(map(len, collect(many).values())) == 40  # none came twice

    class Endless:  # another view every time: as many as there are numbers
        def fetch(self, keys: list[int], fetch: Callable[..., Any], indices: list[int]) -> tuple[Tensor, Tensor]:
            numbers = torch.randint(10**6, (len(indices),))
            state = torch.get_rng_state()
            rows = []
            for index, number in zip(indices, numbers.tolist(), strict=True):
                views_module._seed_generators(f"0 0 {keys[index]} {number}")
                rows.append(fetch([index]))
            torch.set_rng_state(state)
            return torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows])

    seed_everything(0)
    stream = make_stream(Split(), 2, 0, views=Endless())
    assert all(torch.equal(next(stream)[0], batch) for batch in many)


def test_drawings_are_shifted_a_batch_at_a_time_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Drawings(Split):
        underlying_dataset = DrawingsDomain(torch.randint(256, (9, 3, 8, 8), dtype=torch.uint8), torch.arange(9), True)

    def read() -> list[Tensor]:
        seed_everything(0)
        stream = make_stream(Drawings(), 3, 2, views=Views(4, 0, 0))
        return [part for _ in range(5) for part in next(stream)]

    batches = read()
    monkeypatch.delattr(DrawingsDomain, "draw")
    monkeypatch.setattr(DrawingsDomain, "fetch", fetch_one_by_one)
    assert all(torch.equal(one, other) for one, other in zip(batches, read(), strict=True))


def fetch_one_by_one(domain: DrawingsDomain, indices: Tensor) -> tuple[Tensor, Tensor]:
    drawings = [shift_and_flip(domain.images[i : i + 1], torch.rand(1, 3)) for i in indices.tolist()]
    return torch.cat(drawings) / 255, domain.labels[indices]


def test_views_depend_on_the_seed_and_on_the_environment() -> None:
    views = [collect(draw(2, 60, **place)) for place in ({}, {"seed": 1}, {"env": 1})]
    assert not (views[0][5] & views[1][5] or views[0][5] & views[2][5])
    assert views[0] == collect(draw(2, 60))


def test_an_image_folders_views(image_folder: Path) -> None:
    host = find_host("embedded")
    register(host)
    name = f"folder:{image_folder}"
    args = TrainArgs(name, test_envs=[0])
    hparams = get_defaults(host, "ERM", name, {"input_size": 16}) | {"input_size": 16}
    data = build_data(host, args, hparams, host.datasets.get_dataset_class(name))
    seed_everything(0)
    stream = make_stream(data.in_splits[1], 2, 2, views=Views(2, 0, 1))
    keys = data.in_splits[1].keys
    seen = {x.numpy().tobytes() for _ in range(4 * len(keys)) for x in next(stream)[0]}
    assert len(keys) < len(seen) <= 2 * len(keys)


def test_a_run_with_views_goes_on_where_it_was_and_off_is_as_before(tiny: Any) -> None:
    flags = {"dataset": "EmojiStyles", "steps": 5, "checkpoint_freq": 4}

    def read(folder: Path) -> dict[str, Tensor]:
        return load(folder / "model.pkl")["model_dict"]

    def stop(step: int, n_steps: int) -> None:
        if step == 2:
            stopping.request()

    whole = read(tiny.train("whole", {"n_views": 2}, **flags))
    with pytest.raises(stopping.Stopped), stopping.listening():
        tiny.train("broken", {"n_views": 2}, on_step=stop, **flags)
    broken = read(tiny.train("broken", {"n_views": 2}, **flags))
    assert all(torch.equal(broken[name], value) for name, value in whole.items())
    assert not torch.equal(whole["network.1.bias"], read(tiny.train("other", **flags))["network.1.bias"])


@pytest.mark.parametrize("n_views", [1, 0])
def test_validation_shows_the_views_of_training_and_the_held_out_domain_as_it_is(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, n_views: int
) -> None:
    made: list[Any] = []

    def keep(*args: Any) -> Any:
        made.append(make_eval_stream(*args))
        return made[-1]

    monkeypatch.setattr("daft_domainbed.training.engine.make_eval_stream", keep)
    tiny.train("run", {"n_views": n_views}, dataset="EmojiStyles", test_envs=[2], steps=1)
    passes = [[{image.numpy().tobytes() for x, _ in stream for image in x} for _ in range(2)] for stream in made]
    assert [one == other for one, other in passes] == [
        n_views == 1 or env == 2 for _ in ("in", "out") for env in range(4)
    ]
