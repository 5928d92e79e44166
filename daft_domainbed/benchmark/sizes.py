"""How much work each row is: as in the published tables, or less."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """The sizes of all rows.

    Attributes:
        digits: Images of the RotatedMNIST-like set.
        digits_steps: Steps of its job, which is evaluated at step 0, every `digits_checkpoint` and at the last.
        digits_checkpoint: Steps between evaluations.
        jobs: Small jobs of a sweep.
        host_jobs: How many of them upstream's launcher does; the rest is extrapolated.
        chunk: Steps that a loop does in its turn.
        images: Images of the image folder, in each class of each domain.
        batch: Images a domain in a step of it.
        read_steps: Steps whose images are read, after those that upstream reads ahead.
        folders: Runs that `collect_results` reads.
        host_folders: How many of them upstream's reader is given.
        profile_steps: Steps of the folder's job whose time is divided into phases.
        teacher: Backbone of the teachers of DAFT and AFT.
        demo_steps: Updates of each job of the demo's slice.
        domains: Numbers of domains at which growth is measured.
        growth_folders: Numbers of runs at which it is.
    """

    digits: int = 10_000
    digits_steps: int = 61
    digits_checkpoint: int = 30
    jobs: int = 24
    host_jobs: int = 24
    chunk: int = 10
    images: int = 20
    batch: int = 32
    read_steps: int = 40
    folders: int = 4_000
    host_folders: int = 240
    profile_steps: int = 10
    teacher: str = "resnet8_w32"
    demo_steps: int = 100
    domains: tuple[int, ...] = (3, 6, 9, 12)
    growth_folders: tuple[int, ...] = (500, 1_000, 2_000, 4_000)


RECORDS_PER_FOLDER = 50

SIZES = {
    "full": Size(),
    "short": Size(
        digits=3_000, digits_steps=11, digits_checkpoint=10, host_jobs=3, images=15, read_steps=16, host_folders=60,
        profile_steps=4, demo_steps=50,
    ),
    "tiny": Size(
        digits=480, digits_steps=2, digits_checkpoint=1, jobs=3, host_jobs=3, chunk=1, images=2, batch=4,
        read_steps=2, folders=30, host_folders=30, profile_steps=1, teacher="resnet8_w2", demo_steps=2, domains=(3, 4),
        growth_folders=(3, 6),
    ),
}  # fmt: skip
