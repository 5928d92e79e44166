"""Classes that a model is never shown, so that it can be asked what it makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from daft_domainbed.errors import UsageError, suggest


def find_class_names(dataset: Any) -> list[str] | None:
    """Return the names of a data set's classes, in the order of its labels; None where nothing names them."""
    names = getattr(dataset, "CLASSES", None) or getattr(dataset[0], "classes", None)
    return list(map(str, names)) if isinstance(names, (list, tuple)) else None


def list_classes(dataset: Any) -> list[str]:
    """Return the names of a data set's classes, in the order of its labels: their numbers where nothing names them."""
    return find_class_names(dataset) or list(map(str, range(dataset.num_classes)))


def leave_out(dataset: Any, names: Iterable[str]) -> None:
    """Take classes out of every environment of a data set, in place: neither images nor a label of them is left.

    The labels of the others close the gaps, in the same order.

    Raises:
        UsageError: There is no such class, fewer than two are left, or nothing says which sample has which label.
    """
    known, unwanted = list_classes(dataset), list(names)
    for name in unwanted:
        if name not in known:
            raise UsageError(
                f"--leave_out_classes {name}: there is no such class.{suggest(name, known)} They are {', '.join(known)}"
            )
    kept = [label for label, name in enumerate(known) if name not in unwanted]
    if len(kept) < 2:
        raise UsageError(f"--leave_out_classes {','.join(unwanted)} leaves {len(kept)} classes: two are needed")
    for env in dataset:
        _keep(env, kept)
    dataset.num_classes = len(kept)
    if hasattr(dataset, "CLASSES"):
        dataset.CLASSES = [known[label] for label in kept]


def find_places(env: Any, labels: Sequence[int]) -> list[int]:
    """Return where in an environment's data set the samples of some labels are, ascending."""
    return torch.isin(_get_labels(env), torch.tensor(labels)).nonzero().flatten().tolist()


def _get_labels(env: Any) -> Tensor:
    if hasattr(env, "samples"):
        return torch.tensor([label for _, label in env.samples])
    if isinstance(getattr(env, "labels", None), Tensor):
        return env.labels
    if type(env) is TensorDataset:
        return env.tensors[1]
    raise UsageError(f"--leave_out_classes: the labels of a {type(env).__name__} are not known before it is read")


def _keep(env: Any, kept: Sequence[int]) -> None:
    """Keep the samples of some labels, which become 0, 1, ..."""
    places, labels = find_places(env, kept), _get_labels(env)
    new = {label: i for i, label in enumerate(kept)}
    renumbered = [new[int(labels[place])] for place in places]
    if hasattr(env, "samples"):
        paths = [env.samples[place][0] for place in places]
        env.samples = env.imgs = list(zip(paths, renumbered, strict=True))
        env.targets = renumbered
        env.classes = [env.classes[label] for label in kept]
        env.class_to_idx = {name: i for i, name in enumerate(env.classes)}
    elif type(env) is TensorDataset:
        env.tensors = (env.tensors[0][places], torch.tensor(renumbered))
    else:
        env.images, env.labels = env.images[places], torch.tensor(renumbered)
