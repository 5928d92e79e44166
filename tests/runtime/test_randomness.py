from __future__ import annotations

import io
import random

import numpy as np
import torch

from daft_domainbed.runtime.randomness import capture_states, preserve_states, restore_states, seed_everything


def draw() -> tuple[float, float, float, float]:
    return random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()


def test_restored_states_draw_the_same_numbers() -> None:
    seed_everything(1)
    np.random.randn()  # leaves a second normal number waiting, which is part of NumPy's state
    states = capture_states()
    expected = [draw() for _ in range(3)]
    restore_states(states)
    assert [draw() for _ in range(3)] == expected


def test_states_survive_a_file_that_is_loaded_without_running_code() -> None:
    seed_everything(2)
    file = io.BytesIO()
    torch.save(capture_states(), file)
    expected = draw()
    file.seek(0)
    restore_states(torch.load(file, weights_only=True))
    assert draw() == expected


def test_preserved_states_do_not_see_what_is_drawn_inside() -> None:
    seed_everything(3)
    expected = draw()
    seed_everything(3)
    try:
        with preserve_states():
            seed_everything(4)
            draw()
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert draw() == expected


def test_seeding_is_the_training_scripts() -> None:
    seed_everything(5)
    ours = draw()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    assert draw() == ours
