"""What distillation of features and of image-text models compares: cosines, their neighbourhoods, orthogonal maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from daft_domainbed.functional.losses import soft_cross_entropy

# --- features: TinTeM and its comparisons ----------------------------------------------------------------------------


def get_cosines(vectors: Tensor) -> Tensor:
    """Return the pairwise cosines of vectors, [..., n, D] to [..., n, n]."""
    units = F.normalize(vectors, dim=-1)
    return units @ units.mT


def sne_loss(teacher: Tensor, mapped: Tensor, temperatures: Sequence[float]) -> Tensor:
    """KL divergence between the neighbourhoods of mapped vectors and of the teacher's (TinTeM, arXiv 2411.15239).

    At each temperature a row softmax over the cosines with all others, symmetrised and normalised over all pairs, is a
    distribution over pairs; the loss is the mean of KL(teacher's || mapped) over temperatures.

    Args:
        teacher: Vectors, [..., n, D]; leading dimensions are sets that are compared on their own and averaged.
        mapped: Vectors of any width, [..., n, d].
        temperatures: Small ones compare the nearest neighbours alone.

    Example:
        A map that keeps all cosines costs nothing, as scaling does.

        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> abs(sne_loss(x, 3 * x, [0.1]).item()) < 1e-6
        True
    """
    # Cosines near 1 divided by 0.01 need more digits than half precision has.
    with torch.autocast(teacher.device.type, enabled=False):
        ours, theirs = get_cosines(mapped.float()), get_cosines(teacher.float())
        losses = [_compare_pairs(theirs / temperature, ours / temperature) for temperature in temperatures]
        return torch.stack(losses).mean()


def _compare_pairs(p_scores: Tensor, q_scores: Tensor) -> Tensor:
    log_p, log_q = _get_pair_log_probabilities(p_scores), _get_pair_log_probabilities(q_scores)
    return (log_p.exp() * (log_p - log_q)).sum(dim=(-2, -1)).mean()


def _get_pair_log_probabilities(scores: Tensor) -> Tensor:
    itself = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    rows = F.log_softmax(scores.masked_fill(itself, -1e8), dim=-1)  # finite, for 0 x -inf is no number
    pairs = torch.logaddexp(rows, rows.mT)
    return pairs - torch.logsumexp(pairs, dim=(-2, -1), keepdim=True)


def cosine_loss(student: Tensor, target: Tensor) -> Tensor:
    """Return 1 - cosine, averaged over the batch; all that a sample has, [B, ...], is one vector.

    Example:
        >>> cosine_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor(1.)
    """
    return (1 - F.cosine_similarity(student.float().flatten(1), target.float().flatten(1), dim=1)).mean()


def solve_procrustes(cross: Tensor) -> Tensor:
    """Return the matrix with orthonormal rows or columns that has the largest inner product with `cross`, [D, d].

    For cross = A^T B it maps the rows of A onto those of B with the least squared error among the orthogonal ones
    (Schönemann, 1966). Directions of which `cross` says nothing are mapped to 0, for any choice would be arbitrary.

    Example:
        >>> solve_procrustes(torch.tensor([[0.0, 3.0], [2.0, 0.0]])).abs().round()
        tensor([[0., 1.],
                [1., 0.]])
    """
    u, values, vh = torch.linalg.svd(cross.float(), full_matrices=False)
    return (u * (values > 1e-5 * values[0])) @ vh


def vote_by_neighbours(
    features: Tensor, bank: Tensor, labels: Tensor, num_classes: int, k: int = 10, temperature: float = 0.07
) -> Tensor:
    """Return logits, [B, K]: the k nearest of the bank vote with weights exp(cosine / temperature) (Wu et al., 2018).

    Args:
        features: Queries, [B, D].
        bank: Vectors whose classes are known, [N, D].
        labels: Their classes, [N].
        num_classes: K.
        k: At most all of the bank vote.
        temperature: A small one lets the nearest decide.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
        >>> vote_by_neighbours(torch.tensor([[0.2, 1.0]]), bank, torch.tensor([0, 1, 1]), 2).argmax(1)
        tensor([1])
    """
    cosines = F.normalize(features, dim=1) @ F.normalize(bank, dim=1).T
    nearest, rows = cosines.topk(min(k, len(bank)), dim=1)
    votes = F.one_hot(labels[rows], num_classes).to(nearest.dtype)
    # Weights relative to the nearest's sum to at least 1, so nothing overflows; a class without votes is hopeless.
    weights = ((nearest - nearest[:, :1]) / temperature).exp()
    scores = (weights.unsqueeze(2) * votes).sum(dim=1)
    return (scores / scores.sum(dim=1, keepdim=True)).clamp_min(1e-6).log()


# --- images and texts: CLIP and CaRot --------------------------------------------------------------------------------


def contrastive_loss(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Cross-entropy of images over texts and of texts over images, halved (CLIP, Radford et al., 2021).

    Args:
        logits: Scaled cosines of images (rows) and their texts (columns), [B, B].
        labels: Classes, [B]: all texts of an image's class are then right, in equal shares; without, its own alone.

    Example:
        Two images of one class: whichever text is taken is right.

        >>> round(contrastive_loss(torch.zeros(2, 2), torch.tensor([3, 3])).item(), 4)
        0.6931
    """
    same = torch.eye(len(logits), device=logits.device) if labels is None else (labels[:, None] == labels).float()
    targets = same / same.sum(dim=1, keepdim=True)
    return (soft_cross_entropy(logits, targets) + soft_cross_entropy(logits.T, targets)) / 2


def contrastive_distillation_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy to the teacher's similarities in both directions, summed (CaRot's L_SD, arXiv 2311.01723).

    Args:
        student_logits: Scaled cosines of images and texts, [B, B].
        teacher_logits: The same shape; detached here.

    Example:
        >>> z = torch.zeros(2, 2)
        >>> round(contrastive_distillation_loss(z, z).item(), 4)
        1.3863
    """
    teacher = teacher_logits.detach()
    to_texts = soft_cross_entropy(student_logits, F.softmax(teacher, dim=1))
    return to_texts + soft_cross_entropy(student_logits.T, F.softmax(teacher.T, dim=1))


def orthogonality_penalty(weight: Tensor) -> Tensor:
    """Frobenius norm of W^T W - 1, not squared (CaRot's L_OC), of a projection [width, d].

    Example:
        >>> orthogonality_penalty(torch.tensor([[2.0], [0.0]]))
        tensor(3.)
    """
    with torch.autocast(weight.device.type, enabled=False):  # what is left of a difference from 1 needs the digits
        gram = weight.T @ weight
        return torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


def schedule_momentum(step: int, n_steps: int, start: float = 0.05, end: float = 0.9, warmup: float = 0.2) -> float:
    """Return the momentum of CaRot's teacher at a step: linear from start to end over a share of all steps, then end.

    Example:
        >>> schedule_momentum(0, 100), round(schedule_momentum(10, 100), 3), schedule_momentum(20, 100)
        (0.05, 0.475, 0.9)
    """
    return min(end, start + (end - start) * step / (warmup * n_steps)) if warmup * n_steps > 0 else end
