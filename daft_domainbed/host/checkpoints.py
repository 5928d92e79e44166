"""A DomainBed checkpoint as a model again, ours or upstream's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from daft_domainbed.errors import UsageError
from daft_domainbed.host.contract import Host, get_algorithm_class
from daft_domainbed.methods import PLAIN, find_method
from daft_domainbed.models.weights import load, to_plain

CHECKPOINT_KINDS: dict[str, tuple[type, ...]] = {
    "args": (dict,),
    "model_input_shape": (tuple, list),
    "model_num_classes": (int,),
    "model_num_domains": (int,),
    "model_hparams": (dict,),
    "model_dict": (dict,),
}


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a DomainBed `model.pkl`, ours or upstream's, and check that it has a checkpoint's form.

    Raises:
        UsageError: As `load`, or a key is missing or of the wrong kind.
    """
    content = load(path)
    missing = [key for key in CHECKPOINT_KINDS if key not in content]
    if missing:
        raise UsageError(f"{path} is not a DomainBed checkpoint: it lacks {', '.join(missing)}; name a model.pkl")
    for key, kinds in CHECKPOINT_KINDS.items():
        if not isinstance(content[key], kinds):
            raise UsageError(f"{path} is not a DomainBed checkpoint: {key} is a {type(content[key]).__name__}")
    content["model_hparams"] = to_plain(content["model_hparams"])
    content["args"] = to_plain(content["args"])
    return content


def build_model(content: Mapping[str, Any], path: Path, host: Host) -> Any:
    """Build a checkpoint's model from its own hyperparameters, with its weights loaded strictly.

    Raises:
        UsageError: The algorithm is unknown, or the weights do not fit its hyperparameters.
    """
    name = content["args"].get("algorithm", PLAIN)
    # The checkpoint brings every weight: pretrained ones would be downloaded only to be overwritten.
    own = content["model_hparams"] | {"weights": "none"}
    try:
        # Most of our methods hold nothing but ERM's parameters, and need no teacher to be built as that.
        kind = host.algorithms.ERM if find_method(name).is_plain else get_algorithm_class(host, name)
        model = kind(
            tuple(content["model_input_shape"]), content["model_num_classes"], content["model_num_domains"], own
        )
        model.load_state_dict(content["model_dict"])
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    except Exception as error:  # a hostile file makes constructors fail in every way
        text = " ".join(str(error).split())[:200]
        raise UsageError(f"{path}: the weights do not fit the checkpoint's own hyperparameters ({text})") from error
    return model
