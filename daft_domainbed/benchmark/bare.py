"""The limit: what each piece of work costs in plain torch, in loops that share no code with the engine.

Run as a program, it does so many small jobs, or the digits' job, from start to end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OnStep = Callable[[], object]
Batches = Iterable[tuple[Tensor, Tensor]]

CLASSES, DOMAINS = 10, 6  # of RotatedMNIST


class DigitsNetwork(nn.Module):
    """DomainBed's network for 28 x 28 images, its parameters in that order."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        widths = [channels, 64, 128, 128, 128]
        pairs = list(zip(widths, widths[1:], strict=False))
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, 1 + (i == 1), 1) for i, (a, b) in enumerate(pairs))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:])
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = norm(F.relu(convolution(x)))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


def train(network: nn.Module, batches: Batches, on_step: OnStep = lambda: None, lr: float = 1e-3) -> list[float]:
    """Minimise the cross-entropy by Adam over batches; return the losses."""
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    losses = []
    for x, y in batches:
        loss = F.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        on_step()
    return losses


@torch.no_grad()
def evaluate(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that a network gets right, 64 at a time."""
    network.eval()
    pairs = zip(images.split(64), labels.split(64), strict=True)
    right = sum((network(to_float(x)).argmax(1) == y).sum().item() for x, y in pairs)
    network.train()
    return right / len(images)


def attack(
    network: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, eps: float, steps: int, start: Tensor | None = None
) -> Tensor:
    """Ascend the cross-entropy within eps of images in [0, 1], pixel by pixel (Madry et al., 2018)."""
    x_adv = (x if start is None else x + start).clamp(0, 1)
    for _ in range(steps):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(x_adv), y, reduction="sum"), x_adv)
        delta = (x_adv.detach() - x + 1.5 * eps / steps * gradient.sign()).clamp(-eps, eps)
        x_adv = (x + delta).clamp(0, 1)
    return x_adv.detach()


def draw_batches(domains: list[tuple[Tensor, Tensor]], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches without end, so many images of each domain."""
    while True:
        picks = [(images, labels, torch.randint(len(labels), (batch_size,))) for images, labels in domains]
        x = torch.cat([to_float(images[pick]) for images, _, pick in picks])
        yield x, torch.cat([labels[pick] for _, labels, pick in picks])


def to_float(images: Tensor) -> Tensor:
    """Return bytes as numbers in [0, 1]."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


# --- the work of each row -------------------------------------------------------------------------------------------


def run_small_job() -> None:
    """Do what the small job does: 20 steps of 16 images of noise, three evaluations of 48."""
    domains = [(torch.randn(16, 3, 28, 28), torch.randint(2, (16,))) for _ in range(3)]
    run_job(DigitsNetwork(3, 2), domains, 8, 20, 10)


def run_digits_job(root: str, steps: int, checkpoint: int) -> None:
    """Do what the RotatedMNIST job does, on the same digits without their rotation."""
    run_job(DigitsNetwork(1, CLASSES), read_digits(root), 64, steps, checkpoint)


def run_job(
    network: nn.Module, domains: list[tuple[Tensor, Tensor]], batch_size: int, steps: int, checkpoint: int
) -> None:
    """Train on all domains but the first, and evaluate on all at each checkpoint."""
    done = 0

    def on_step() -> None:
        nonlocal done
        if done % checkpoint == 0 or done == steps - 1:
            for images, labels in domains:
                evaluate(network, images, labels)
        done += 1

    train(network, islice(draw_batches(domains[1:], batch_size), steps), on_step)


def train_digits(root: str, on_step: OnStep) -> None:
    """Take steps on the digits without end."""
    train(DigitsNetwork(1, CLASSES), draw_batches(read_digits(root)[1:], 64), on_step)


def evaluate_digits(root: str, on_step: OnStep) -> None:
    """Evaluate on all of the digits without end."""
    network, domains = DigitsNetwork(1, CLASSES), read_digits(root)
    while True:
        for images, labels in domains:
            evaluate(network, images, labels)
        on_step()


def read_digits(root: str) -> list[tuple[Tensor, Tensor]]:
    """Read MNIST's files and deal them to the domains."""
    folder = Path(root, "MNIST", "raw")

    def read(name: str, header: int) -> Tensor:
        parts = (bytearray((folder / f"{part}-{name}-ubyte").read_bytes()[header:]) for part in ("train", "t10k"))
        return torch.cat([torch.frombuffer(part, dtype=torch.uint8) for part in parts])

    images, labels = read("images-idx3", 16).view(-1, 1, 28, 28), read("labels-idx1", 8).long()
    return [(images[i::DOMAINS], labels[i::DOMAINS]) for i in range(DOMAINS)]


def answer(backbone: str, batch: int, on_step: OnStep) -> None:
    """Have a frozen network answer a batch of EmojiStyles' shape without end."""
    network, x = build_network(backbone).eval(), torch.rand(batch, 3, 32, 32)
    with torch.no_grad():
        while True:
            network(x)
            on_step()


def fine_tune(backbone: str, batch: int, attack_steps: int, on_step: OnStep) -> None:
    """Train the head of a frozen network on attacked images without end: what of it has to be computed, once."""
    network = build_network(backbone).eval()
    featurizer, head = network[0].requires_grad_(False), network[1]
    assert isinstance(head, nn.Linear)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    x, y = torch.rand(batch, 3, 32, 32), torch.randint(8, (batch,))
    while True:
        with torch.no_grad():  # the target: what the teacher believes of the clean image
            target = (F.one_hot(y, head.out_features) + network(x).softmax(1)) / 2
        x_adv = attack(network, x, y, 4 / 255, attack_steps, start=torch.empty_like(x).uniform_(-4 / 255, 4 / 255))
        with torch.no_grad():
            features = featurizer(x_adv)
        loss = F.cross_entropy(head(features), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        on_step()


def train_tail(backbone: str, side: int, n_stages: int, batch: int, on_step: OnStep) -> None:
    """Train what lies behind a network's first stages without end, on what these gave; the cut is what is shared."""
    from daft_domainbed.models.backbones import build_backbone
    from daft_domainbed.models.stages import Prefix

    featurizer: Any = build_backbone(backbone, (3, 32, 32), "none", side).to(memory_format=torch.channels_last)
    prefix, head = Prefix(featurizer.network, n_stages), nn.Linear(featurizer.n_outputs, 8)
    x, y = torch.rand(256, 3, 32, 32), torch.randint(8, (256,))
    for part in prefix.modules:
        part.eval().requires_grad_(False)
    with torch.no_grad():
        rows = torch.cat([prefix.compute(images, featurizer) for images in x.split(16)])
    optimizer = torch.optim.Adam([*featurizer.parameters(), *head.parameters()], lr=1e-3)
    while True:
        picked = torch.randint(len(x), (batch,))
        loss = F.cross_entropy(head(prefix.go_on(rows[picked], x[picked], featurizer)), y[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        on_step()


def build_network(backbone: str) -> nn.Sequential:
    """Build a network for EmojiStyles; its definition is the one thing that is shared."""
    from daft_domainbed.models.resnet8 import ResNet8

    featurizer = ResNet8(3, int(backbone.rpartition("w")[2]))
    return nn.Sequential(featurizer, nn.Linear(featurizer.n_outputs, 8))


def read_folder(root: str, batch: int, steps: int, threads: int) -> float:
    """Return images a second through torch's own loader: as many workers as threads, DomainBed's augmentation."""
    import time

    from torch.utils.data import ConcatDataset, DataLoader, RandomSampler
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, scale=(0.7, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.3, 0.3, 0.3, 0.3),
            transforms.RandomGrayscale(),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    domains = sorted(path for path in Path(root, "PACS").iterdir() if path.is_dir())[1:]
    dataset: ConcatDataset[Any] = ConcatDataset([ImageFolder(str(domain), transform) for domain in domains])
    ahead = 2 * threads  # what it reads before it is asked does not count
    size = batch * len(domains)
    sampler = RandomSampler(dataset, replacement=True, num_samples=(ahead + steps) * size)
    began = 0.0
    for i, _ in enumerate(DataLoader(dataset, size, sampler=sampler, num_workers=threads)):
        if i == ahead - 1:
            began = time.perf_counter()
    return steps * size / (time.perf_counter() - began)


def read_records(root: str) -> float:
    """Return records a second, where each line is parsed and nothing is made of it."""
    import json
    import time

    loads: Callable[[bytes], Any] = import_module("orjson").loads if find_spec("orjson") else json.loads
    began, count = time.perf_counter(), 0
    for folder in Path(root).iterdir():
        for line in (folder / "results.jsonl").read_bytes().splitlines():
            loads(line)
            count += 1
    return count / (time.perf_counter() - began)


if __name__ == "__main__":
    work, *numbers = sys.argv[1:]
    if work == "digits":
        run_digits_job(numbers[0], int(numbers[1]), int(numbers[2]))
    else:
        for _ in range(int(work)):
            run_small_job()
