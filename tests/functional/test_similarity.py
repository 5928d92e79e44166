"""Losses of features and of image-text pairs: by hand, against plain formulas, and against the authors' own code."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from daft_domainbed.functional.similarity import (
    contrastive_distillation_loss,
    contrastive_loss,
    cosine_loss,
    get_cosines,
    orthogonality_penalty,
    schedule_momentum,
    sne_loss,
    solve_procrustes,
    vote_by_neighbours,
)

few_examples = settings(max_examples=25)
seeds = st.integers(0, 2**32 - 1)
TEMPERATURES = [0.01 * i for i in range(1, 11)]


def make_wave(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """The tensors on which the authors' code was run: sines of 0, 1, 2, ..."""
    return (scale * torch.sin(torch.arange(math.prod(shape), dtype=torch.float32) + shift)).view(shape)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- TinTeM ----------------------------------------------------------------------------------------------------------

TEACHER = make_wave(5, 3, 6, shift=1.0) * (1 + make_wave(5, 3, 1, scale=0.5))  # images, tokens, width
STUDENT = make_wave(5, 3, 4, scale=0.7, shift=2.0)

# emannix/cospress-cosine-similarity-preserving-compression 65e94c0,
# goo/methods/self_supervised/proteus_vmfsne7_reversed.py: Proteus.model_step with the published settings, on the tokens
# above, the head's weight make_wave(4, 6, scale=0.6, shift=3.0) and bias make_wave(4, scale=0.1, shift=4.0).
COSPRESS = {"local": 0.12495530, "global": 0.19454095, "fea": 1.02515197, "tok": 1.44428706, "gradient": 0.26264921}
COSPRESS_BY_TEMPERATURE = {0.01: (0.07020164, 0.35334405), 0.1: (0.10249426, 0.16355567)}


def make_head(n_in: int, n_out: int) -> nn.Sequential:
    head = nn.Sequential(nn.LayerNorm(n_in), nn.Linear(n_in, n_out))
    head[1].weight.data = make_wave(n_out, n_in, scale=0.6, shift=3.0)
    head[1].bias.data = make_wave(n_out, scale=0.1, shift=4.0)
    return head


def test_tintem_agrees_with_the_authors_code() -> None:
    head = make_head(6, 4)
    mapped = head(TEACHER)
    local_loss = sne_loss(TEACHER, mapped, TEMPERATURES)
    global_loss = sne_loss(TEACHER[:, 0], mapped[:, 0], TEMPERATURES)
    assert local_loss.item() == pytest.approx(COSPRESS["local"], abs=1e-5)
    assert global_loss.item() == pytest.approx(COSPRESS["global"], abs=1e-5)
    assert cosine_loss(STUDENT, mapped).item() == pytest.approx(COSPRESS["fea"], abs=1e-5)
    assert cosine_loss(STUDENT[:, 0], mapped[:, 0]).item() == pytest.approx(COSPRESS["tok"], abs=1e-5)
    (local_loss + global_loss).backward()
    assert head[1].weight.grad.norm().item() == pytest.approx(COSPRESS["gradient"], abs=1e-5)


@pytest.mark.parametrize("temperature", COSPRESS_BY_TEMPERATURE)
def test_each_temperature_agrees_with_the_authors_code(temperature: float) -> None:
    mapped = make_head(6, 4)(TEACHER)
    local_loss, global_loss = COSPRESS_BY_TEMPERATURE[temperature]
    assert sne_loss(TEACHER, mapped, [temperature]).item() == pytest.approx(local_loss, abs=1e-5)
    assert sne_loss(TEACHER[:, 0], mapped[:, 0], [temperature]).item() == pytest.approx(global_loss, abs=1e-5)


# The same repository's goo/methods/self_supervised/proteus.py: Proteus.model_step, one head for both, make_head(4, 6).
PROTEUS = {"fea": 1.80620766, "tok": 1.46741748}


def test_proteus_agrees_with_the_authors_code() -> None:
    answered = make_head(4, 6)(STUDENT)
    assert F.mse_loss(answered, TEACHER).item() == pytest.approx(PROTEUS["fea"], abs=1e-5)
    assert F.mse_loss(answered[:, 0], TEACHER[:, 0]).item() == pytest.approx(PROTEUS["tok"], abs=1e-5)


def sum_by_hand(teacher: Tensor, mapped: Tensor, temperature: float) -> float:
    """The formula with loops, in double precision."""

    def get_pairs(vectors: Tensor) -> list[list[float]]:
        n = len(vectors)
        cosines = [[F.cosine_similarity(vectors[i], vectors[j], dim=0).item() for j in range(n)] for i in range(n)]
        weights = [[math.exp(cosines[i][j] / temperature) * (i != j) for j in range(n)] for i in range(n)]
        rows = [[weight / sum(row) for weight in row] for row in weights]
        return [[(rows[i][j] + rows[j][i]) / (2 * n) for j in range(n)] for i in range(n)]

    p, q = get_pairs(teacher.double()), get_pairs(mapped.double())
    return sum(a * math.log(a / b) for x, y in zip(p, q, strict=True) for a, b in zip(x, y, strict=True) if a > 0)


@few_examples
@given(seed=seeds, temperature=st.floats(0.05, 1))
def test_neighbourhoods_by_hand(seed: int, temperature: float) -> None:
    teacher, mapped = draw(seed, 6, 5), draw(seed + 1, 6, 3)
    assert sne_loss(teacher, mapped, [temperature]).item() == pytest.approx(
        sum_by_hand(teacher, mapped, temperature), rel=1e-3, abs=1e-5
    )


@few_examples
@given(seed=seeds)
def test_rotations_and_scales_cost_nothing(seed: int) -> None:
    teacher = draw(seed, 2, 7, 5)
    rotation = torch.linalg.qr(draw(seed + 1, 5, 5)).Q
    lengths = draw(seed + 2, 2, 7, 1).exp()
    assert sne_loss(teacher, lengths * teacher @ rotation, TEMPERATURES).item() == pytest.approx(0, abs=1e-4)
    assert sne_loss(teacher, draw(seed + 3, 2, 7, 5), TEMPERATURES).item() > 0.01


def test_sets_are_compared_on_their_own() -> None:
    teacher, mapped = draw(0, 3, 6, 5), draw(1, 3, 6, 4)
    alone = [sne_loss(a, b, [0.1]) for a, b in zip(teacher, mapped, strict=True)]
    torch.testing.assert_close(sne_loss(teacher, mapped, [0.1]), torch.stack(alone).mean())


def test_gradients_are_finite_for_equal_vectors() -> None:
    mapped = torch.ones(4, 3, requires_grad=True)
    sne_loss(draw(0, 4, 5), mapped, TEMPERATURES).backward()
    assert mapped.grad.isfinite().all()


def correlate_cosines(a: Tensor, b: Tensor) -> float:
    above = torch.ones(len(a), len(a)).triu(1).bool()
    pairs = torch.stack([get_cosines(a)[above], get_cosines(b)[above]])
    return torch.corrcoef(pairs)[0, 1].item()


def test_the_map_becomes_nearly_orthogonal() -> None:
    # Twelve clusters in a space that the map cannot hold; a map that keeps cosines stretches no direction.
    vectors = draw(0, 12, 24).repeat_interleave(10, dim=0) + 0.5 * draw(1, 120, 24)
    weight = torch.nn.Parameter(draw(2, 12, 24) / 24**0.5)
    optimizer = torch.optim.Adam([weight], lr=0.01)

    def measure_spread() -> float:
        values = torch.linalg.svdvals(weight.detach())
        return (values.std() / values.mean()).item()

    before = measure_spread(), correlate_cosines(vectors, vectors @ weight.detach().T)
    for _ in range(80):
        optimizer.zero_grad()
        sne_loss(vectors, vectors @ weight.T, TEMPERATURES).backward()
        optimizer.step()
    after = measure_spread(), correlate_cosines(vectors, vectors @ weight.detach().T)
    assert after[0] < 0.7 * before[0]
    assert after[1] > 0.9 > 0.75 > before[1]


# --- maps and votes --------------------------------------------------------------------------------------------------


@few_examples
@given(seed=seeds, widths=st.sampled_from([(6, 4), (4, 4), (4, 6)]))
def test_procrustes_finds_the_map_that_made_the_data(seed: int, widths: tuple[int, int]) -> None:
    source, n = draw(seed, 20, widths[0]), max(widths)
    truth = torch.linalg.qr(draw(seed + 1, n, n)).Q[: widths[0], : widths[1]]
    truth = solve_procrustes(truth)  # orthonormal along the shorter side
    found = solve_procrustes(source.T @ (source @ truth))
    shorter = found.T @ found if widths[0] >= widths[1] else found @ found.T
    torch.testing.assert_close(shorter, torch.eye(min(widths)), atol=1e-5, rtol=0)
    if widths[0] <= widths[1]:  # nothing of the data is lost on the way
        torch.testing.assert_close(found, truth, atol=1e-3, rtol=0)


def test_procrustes_beats_other_orthogonal_maps() -> None:
    source, target = draw(0, 30, 6), draw(1, 30, 4)
    cross = source.T @ target
    best = (solve_procrustes(cross) * cross).sum()
    for seed in range(20):
        other = torch.linalg.qr(draw(seed, 6, 4)).Q
        assert (other * cross).sum() <= best


def test_neighbours_vote_by_their_cosines() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])
    logits = vote_by_neighbours(torch.tensor([[2.0, 0.0]]), bank, torch.tensor([0, 1, 1, 2]), 3, k=3, temperature=0.5)
    weights = [math.exp(1 / 0.5), math.exp(0.8 / 0.5) + math.exp(0 / 0.5)]
    expected = [weight / sum(weights) for weight in weights]
    assert logits.exp()[0, :2].tolist() == pytest.approx(expected, rel=1e-5)
    assert logits[0, 2] < -13


# --- CLIP and CaRot --------------------------------------------------------------------------------------------------

# MLAI-Yonsei/CaRot c3e8bdc: ClipLoss of clip/loss.py, without labels and with ground_labels [0, 1, 0, 2, 1]; of
# src/models/carot_loss.py lines 156 to 170 (rho 0.05 alone, then l_orth_wv 0.2 alone), 177 to 203 (dist_loss) and 218
# to 234 (the teacher's weight over steps 0 to 13 of 40, every 2, the student's 1 more each step).
IMAGES, TEXTS = F.normalize(make_wave(5, 4, shift=1.0), dim=1), F.normalize(make_wave(5, 4, shift=2.5), dim=1)
EMA_IMAGES, EMA_TEXTS = F.normalize(make_wave(5, 4, shift=0.5), dim=1), F.normalize(make_wave(5, 4, shift=3.5), dim=1)
CAROT = {"clip": 5.55686378, "multi-positive": 5.70791245, "rho": 0.10937854, "oc": 0.50450432, "sd": 10.93433571}
CAROT_EMA = [0.95, 0.95, 2.461875, 2.461875, 3.7943907, 3.7943907, 4.7961435, 4.7961435, 5.2165294, 5.2165294]
CAROT_EMA += [5.7948761, 5.7948761, 6.5153885, 6.5153885]


def test_carot_agrees_with_the_authors_code() -> None:
    logits = 7 * IMAGES @ TEXTS.T
    assert contrastive_loss(logits).item() == pytest.approx(CAROT["clip"], abs=1e-5)
    labels = torch.tensor([0, 1, 0, 2, 1])
    assert contrastive_loss(logits, labels).item() == pytest.approx(CAROT["multi-positive"], abs=1e-5)
    penalty = 0.2 * orthogonality_penalty(make_wave(6, 4, scale=0.6, shift=1.5))
    assert penalty.item() == pytest.approx(CAROT["oc"], abs=1e-5)
    product = make_wave(6, 4, scale=0.6, shift=1.5) @ make_wave(3, 4, scale=0.6, shift=2.0).T
    assert 0.05 * product.norm().item() == pytest.approx(CAROT["rho"], abs=1e-5)
    distillation = contrastive_distillation_loss(logits, 5 * EMA_IMAGES @ EMA_TEXTS.T)
    assert distillation.item() == pytest.approx(CAROT["sd"], abs=1e-5)


def test_the_teachers_schedule_agrees_with_the_authors_code() -> None:
    teacher, found = 0.0, []
    for step in range(14):
        if step % 2 == 0:
            momentum = schedule_momentum(step, n_steps=40)
            teacher = momentum * teacher + (1 - momentum) * (step + 1)
        found.append(teacher)
    assert found == pytest.approx(CAROT_EMA, abs=1e-5)


@few_examples
@given(seed=seeds)
def test_labels_that_differ_change_nothing(seed: int) -> None:
    logits = draw(seed, 6, 6)
    torch.testing.assert_close(contrastive_loss(logits, torch.arange(6)), contrastive_loss(logits))
    expected = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6))) / 2
    torch.testing.assert_close(contrastive_loss(logits), expected)


def test_the_distillation_is_least_where_student_and_teacher_agree() -> None:
    teacher = draw(0, 5, 5)
    student = teacher.clone().requires_grad_()
    contrastive_distillation_loss(student, teacher).backward()
    torch.testing.assert_close(student.grad, torch.zeros(5, 5), atol=1e-6, rtol=0)


def test_the_penalty_raises_the_smallest_singular_value() -> None:
    weight = nn.Parameter(draw(0, 8, 4) * torch.tensor([1.0, 0.5, 0.2, 0.05]))
    optimizer = torch.optim.Adam([weight], lr=0.02)
    assert torch.linalg.svdvals(weight.detach()).min() < 0.2
    for _ in range(200):
        optimizer.zero_grad()
        orthogonality_penalty(weight).backward()
        optimizer.step()
    assert torch.linalg.svdvals(weight.detach()).min() > 0.9


def test_the_penalty_of_an_orthogonal_matrix_has_a_gradient() -> None:
    weight = torch.eye(3, requires_grad=True)
    orthogonality_penalty(weight).backward()
    assert weight.grad.isfinite().all()
