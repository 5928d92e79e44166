"""Contrastive pretraining, and answers by the text tower."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from daft_domainbed.algorithms import clip as module
from daft_domainbed.errors import UsageError

pytest.importorskip("open_clip")


@pytest.fixture
def clip(bench: Any) -> Iterator[Any]:
    """The small model before its first step."""
    return bench.make("CLIP", backbone="open_clip/small")


def test_prompts_name_the_classes_and_captions_the_styles_too(bench: Any, clip: Any) -> None:
    tokenizer = __import__("open_clip").SimpleTokenizer(context_length=16)
    assert clip.styles == ["twemoji", "openmoji", "contrast"]  # environment 0 is held out
    assert clip.prompts.shape == (8, 4, 16)
    assert torch.equal(clip.prompts[3, 0], tokenizer("a picture of a face")[0])
    assert torch.equal(clip.captions[2, 7, 1], tokenizer("a drawing of a vehicle in contrast style")[0])
    assert not {"prompts", "captions"} & clip.state_dict().keys()


def test_zero_shot_answers_are_scaled_cosines_with_mean_prompts(bench: Any, clip: Any) -> None:
    bench.train(clip, 1)
    clip.eval()
    x, _ = bench.draw_minibatches(1)[0]
    model = clip.featurizer.network.clip
    with torch.no_grad():
        images = F.normalize(model.encode_image((x - 0.5) / 0.5), dim=1)
        texts = [F.normalize(model.encode_text(prompts), dim=1).mean(0) for prompts in clip.prompts]
        texts = F.normalize(torch.stack(texts), dim=1)
        expected = model.logit_scale.exp() * images @ texts.T
        torch.testing.assert_close(clip.predict(x), expected, atol=1e-4, rtol=1e-4)


def test_the_head_follows_every_step(bench: Any, clip: Any) -> None:
    x, _ = bench.draw_minibatches(1)[0]
    before = clip.eval().predict(x)
    bench.train(clip.train(), 1)
    after = clip.eval().predict(x)
    assert not torch.equal(before, after)
    plain = bench.make("ERM", backbone="open_clip/small")
    plain.load_state_dict(clip.state_dict(), strict=True)
    assert torch.equal(plain.eval().predict(x), after)


@pytest.mark.parametrize("names_style", [True, False])
def test_an_update_is_the_contrastive_step(bench: Any, clip: Any, names_style: bool) -> None:
    minibatches = bench.draw_minibatches(0, size=4)
    x, y = (torch.cat(parts) for parts in zip(*minibatches, strict=True))
    generator = torch.Generator()
    while True:  # until the coin falls on that side
        state = clip.generator.get_state()
        generator.set_state(state)
        templates = torch.randint(4, (12,), generator=generator)
        if (torch.rand((), generator=generator) < 0.5) == names_style:
            break
        clip.generator.set_state(generator.get_state())
    domains = torch.arange(3).repeat_interleave(4)
    tokens = clip.captions[domains, y, templates] if names_style else clip.prompts[y, templates]
    same = (y[:, None] == y) & ((domains[:, None] == domains) if names_style else True)
    targets = same / same.sum(1, keepdim=True)
    model = clip.featurizer.network.clip
    with torch.no_grad():
        logits = model.logit_scale.exp() * model.encode_image(2 * x - 1, True) @ model.encode_text(tokens, True).T
        expected = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        # Statistics of the batch norm have moved by this pass, which does not matter in training mode.
    found = clip.update(minibatches)
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_untrained_towers_stay_as_they_are(bench: Any) -> None:
    clip = bench.make("CLIP", backbone="open_clip/small", clip_trains=False)
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    assert bench.train(clip, 1)[0]["loss"] > 0
    assert all(torch.equal(value, before[name]) for name, value in clip.state_dict().items())
    assert clip.training


def test_other_networks_have_no_texts(bench: Any) -> None:
    with pytest.raises(UsageError, match="needs a backbone of open_clip"):
        bench.make("CLIP")


def test_outside_a_run_classes_are_numbered() -> None:
    assert module.list_classes(2) == ["class 0", "class 1"]
    assert module.list_styles(2) == ["domain 0", "domain 1"]


def test_folders_name_their_classes(bench: Any) -> None:
    class Pictures:
        classes = ["alarm_clock", "bike"]

    class Split:
        underlying_dataset = Pictures()

    from dataclasses import replace

    from daft_domainbed.teachers.facts import run_in_progress

    facts = bench.get_facts()
    data = replace(facts.dataset, dataset_class=object)
    with run_in_progress(replace(facts, dataset=data, splits=[(Split(), Split())])):
        assert module.list_classes(2) == ["alarm clock", "bike"]
