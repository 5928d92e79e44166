"""Checkpoints of DomainBed's own algorithms are used as models: with the accuracy of the record."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from daft_domainbed import load_model
from daft_domainbed.arguments import TrainArgs
from daft_domainbed.data.splits import build_data
from daft_domainbed.host import contract
from daft_domainbed.runtime.layout import read_records

pytestmark = pytest.mark.usefixtures("upstream")


@pytest.mark.parametrize("algorithm", ["ERM", "CORAL"])
def test_accuracy_is_the_records(tiny: Any, data_dir: str, algorithm: str) -> None:
    flags = {"dataset": "RotatedMNIST", "data_dir": data_dir, "algorithm": algorithm}
    run = tiny.train(host="upstream", **flags)
    content = torch.load(run / "model.pkl", weights_only=False)
    for name in ("host", "precision", "device"):  # as DomainBed's own script writes it
        del content["args"][name]
    del content["class_names"], content["provenance"]
    torch.save(content, run / "upstream.pkl")
    model, record = load_model(run / "upstream.pkl"), read_records(run)[-1]
    args = TrainArgs(**record["args"])
    host = contract.find_host("upstream")
    torch.manual_seed(args.seed)
    data = build_data(host, args, record["hparams"], contract.get_dataset_class(host, "RotatedMNIST"))
    images = [data.in_splits[0][i] for i in range(len(data.in_splits[0]))]
    found = [int(prediction.label) for prediction in model.predict([x for x, _ in images])]
    assert sum(label == int(y) for label, (_, y) in zip(found, images, strict=True)) / len(images) == pytest.approx(
        record["env0_in_acc"], abs=1e-9
    )
