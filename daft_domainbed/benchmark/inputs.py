"""The data that rows are measured on: made here, the same each time."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import combinations, product
from pathlib import Path

from daft_domainbed.benchmark.sizes import RECORDS_PER_FOLDER
from daft_domainbed.runtime.layout import DONE_FILE, RECORDS_FILE

PACS_DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
PACS_CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
PACS_SIDE = 227  # of its files


def write_digits(root: Path, count: int) -> Path:
    """Write handwritten digits, the package's own shifted by up to 3 pixels, as MNIST's files."""
    import numpy as np
    import torch

    from daft_domainbed.embedded.data import load_digits
    from daft_domainbed.embedded.in_memory import enlarge

    random = np.random.default_rng(0)
    images, labels = load_digits()
    picks = random.integers(len(labels), size=count)
    large = enlarge(torch.tensor(images)).numpy()[picks]
    shifted = np.stack([np.roll(image, random.integers(-3, 4, 2), (0, 1)) for image in large])
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    n_train = count * 6 // 7  # MNIST's own ratio
    for part, rows in (("train", slice(n_train)), ("t10k", slice(n_train, None))):
        for name, values in (("images-idx3", shifted[rows]), ("labels-idx1", labels[picks][rows].astype(np.uint8))):
            header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
            (folder / f"{part}-{name}-ubyte").write_bytes(header + values.tobytes())
    return root


def write_folder(root: Path, images: int, side: int = PACS_SIDE) -> Path:
    """Write so many JPEGs in each class of each domain, in PACS' format."""
    return write_domains(root / "PACS", PACS_DOMAINS, PACS_CLASSES, images, side).parent


def write_domains(
    root: Path, domains: tuple[str, ...], classes: tuple[str, ...], images: int, side: int, ending: str = "jpg"
) -> Path:
    """Write pictures that compress as photographs do: coarse noise, enlarged, with a little fine noise on it."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for domain, label, i in product(domains, classes, range(images)):
        coarse = Image.fromarray(random.integers(256, size=(12, 12, 3), dtype=np.uint8))
        picture = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.int16)
        picture = np.clip(picture + random.integers(-8, 9, picture.shape), 0, 255).astype(np.uint8)
        path = root / domain / label / f"{i}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    return root


def write_records(root: Path, folders: int) -> Path:
    """Write the runs of a sweep over PACS: draws within trials within test environments, algorithm after algorithm.

    The first 30 folders are one draw of one algorithm, complete; 30 more are the next draw.
    """
    import numpy as np

    from daft_domainbed import plugin
    from daft_domainbed.arguments import TrainArgs
    from daft_domainbed.host import contract
    from daft_domainbed.plugin.defaults import get_default_hparams

    host = contract.find_host()
    plugin.register(host)
    random = np.random.default_rng(0)
    names = [f"env{i}_{part}_acc" for i in range(4) for part in ("in", "out")]
    test_envs = [[i] for i in range(4)] + [list(pair) for pair in combinations(range(4), 2)]
    hparams = get_default_hparams(host, "ERM", contract.describe_dataset(host, "PACS", {}))
    runs = product(host.algorithms.ALGORITHMS + [f"Other{i}" for i in range(9)], range(20), range(3), test_envs)
    for i, (algorithm, draw, trial, held_out) in zip(range(folders), runs, strict=False):
        args = TrainArgs("PACS", algorithm, draw, trial, test_envs=held_out, data_dir="data")
        fixed = {"args": asdict(args) | {"output_dir": f"sweep/{i}"}, "hparams": hparams, "mem_gb": 0.0}
        lines = []
        for step, accs in enumerate(random.random((RECORDS_PER_FOLDER, len(names))).tolist()):
            numbers = {"step": 100 * step, "epoch": step / 3, "loss": accs[0], "step_time": accs[1]}
            lines.append(json.dumps(fixed | numbers | dict(zip(names, accs, strict=True)), sort_keys=True))
        folder = root / f"{i:06}"
        folder.mkdir(parents=True)
        (folder / RECORDS_FILE).write_text("\n".join(lines) + "\n")
        (folder / DONE_FILE).write_text("done")
    return root
