"""A student is nothing but an ERM: DomainBed alone loads its weights, and gets its accuracies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.training.engine import train

# Run in the clone, by an interpreter that cannot import this package.
READER = """
import json, sys, torch
import numpy as np
sys.modules["daft_domainbed"] = None
from domainbed import algorithms, datasets
from domainbed.lib import misc
content = torch.load(sys.argv[1], weights_only=True)
args, hparams = content["args"], content["model_hparams"]
erm = algorithms.ERM(content["model_input_shape"], content["model_num_classes"], content["model_num_domains"], hparams)
erm.load_state_dict(content["model_dict"])
erm.eval()
np.random.seed(args["seed"]); torch.manual_seed(args["seed"])
dataset = vars(datasets)[args["dataset"]](args["data_dir"], args["test_envs"], hparams)
accuracies = {}
for i, env in enumerate(dataset):
    size, seed = int(len(env) * args["holdout_fraction"]), misc.seed_hash(args["trial_seed"], i)
    for part, split in zip(("out", "in"), misc.split_dataset(env, size, seed)):
        loader = torch.utils.data.DataLoader(split, batch_size=64)
        accuracies[f"env{i}_{part}_acc"] = misc.accuracy(erm, loader, None, "cpu")
print(json.dumps(accuracies))
"""


@pytest.mark.parametrize("algorithm", ["KD", "DAFT"])
def test_domainbed_reads_a_student(clone: str, data_dir: str, tmp_path: Path, algorithm: str) -> None:
    hparams = {"batch_size": 8, "backbone": "default", "teacher_backbone": "resnet8_w4"}
    flags = {"dataset": "ColoredMNIST", "data_dir": data_dir, "test_envs": [2], "steps": 6, "checkpoint_freq": 6}
    args = TrainArgs(algorithm=algorithm, hparams=json.dumps(hparams), output_dir=str(tmp_path / "run"), **flags)
    folder = train(args, quiet=True)
    last = json.loads((folder / "results.jsonl").read_text().splitlines()[-1])

    command = [sys.executable, "-B", "-c", READER, str(folder / "model.pkl")]
    result = subprocess.run(command, cwd=clone, capture_output=True, text=True)

    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {key: value for key, value in last.items() if key.endswith("_acc")}
