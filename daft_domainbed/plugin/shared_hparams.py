"""Which hyperparameters do all networks, our loop, folders of images and slots have?"""

from __future__ import annotations

from dataclasses import replace

from daft_domainbed.host.contract import DEFAULT_INPUT_SIZE
from daft_domainbed.hparams import Hparam, is_frozen, is_text, number, one_of, one_or_more, or_auto, or_word
from daft_domainbed.methods import Slot

_NAMES, _SIDES = one_or_more(is_text), one_or_more(or_auto(number(8, integer=True)))

# Of every algorithm that builds its network through the host's featurizer.
NETWORK: dict[str, Hparam] = {
    "backbone": Hparam(
        "default",
        _NAMES,
        "`default`, DomainBed's own choice for the input; `resnet8_w<N>`; `ranker_w<N>` for lists of texts; a "
        "torchvision name; `timm/<name>`; or "
        "several names, whose features are taken together",
    ),
    "weights": Hparam(
        "pretrained",
        _NAMES,
        "of a torchvision or timm backbone: `pretrained`, `none`, or a file (`.safetensors`, or a state dict that "
        "torch saved)",
    ),
    "backbone_frozen": Hparam(
        False, is_frozen, "what is not trained: true, all but the head; `stages:3`, stem and first stages"
    ),
    "backbone_input_size": Hparam(
        "auto", _SIDES, "side in pixels to which a torchvision or timm backbone resizes its input; `auto` leaves it"
    ),
    "pixels": Hparam(
        "imagenet",
        one_of("imagenet", "unit", "none", "tokens"),
        "how the data set normalises its images; kept with a checkpoint, so that its backbone can normalise anew",
    ),
}
# Of how our engine trains any algorithm; upstream's own loop knows none of them.
ENGINE: dict[str, Hparam] = {
    "n_views": Hparam(
        0, number(0, integer=True), "augmented views of an image, which come again; 0: endless", is_optional=True
    ),
    "lr_schedule": Hparam("constant", one_of("constant", "cosine"), "of the learning rate", is_optional=True),
    "average_start": Hparam(
        "never",
        or_word("never", number(0, integer=True)),
        "steps before the weights are averaged, for a read-out beside the plain one",
        is_optional=True,
    ),
    "probe_steps": Hparam(
        0, number(0, integer=True), "steps in which the head alone is trained, before the rest is", is_optional=True
    ),
}
FOLDER: dict[str, Hparam] = {
    "input_size": Hparam(
        DEFAULT_INPUT_SIZE,
        number(8, integer=True),
        "of `folder:` sets only: side in pixels; up to 64, DomainBed's small-image defaults apply, the student is "
        "`resnet8_w8` and the teacher `resnet8_w32`",
    ),
}


def list_slot_hparams(slot: Slot) -> dict[str, Hparam]:
    """Return the hyperparameters that name or describe the model of a slot."""
    name, of = slot.prefix, f"of the {slot.prefix.replace('_', ' ')}"
    of += "" if of.endswith("teacher") else " model"
    made = f"`{name}_backbone` with `{name}_weights`" if slot.kind is None else "found in the store, else trained there"
    if slot.described_by:
        which = f"where {slot.asked_by} asks for it: "
        described = {
            slot.prefix: Hparam("auto", is_text, f"{which}a checkpoint, a folder to search, or auto"),
            slot.steps: Hparam("auto", or_auto(number(1, integer=True)), f"{which}updates {of}; auto: a quarter"),
        }
        return {name: replace(hparam, is_optional=True) for name, hparam in described.items() if name}
    hparams = {
        "": Hparam(
            "auto",
            is_text,
            "a checkpoint; a folder, in which the match with the best out-split accuracy over training domains is "
            f"taken (never a student of a teacher); or `auto`: {made}",
        ),
        "_backbone": Hparam("resnet50", _NAMES, f"network {of}, as `backbone`"),
        "_weights": Hparam("pretrained", _NAMES, f"what the network {of} starts from, as `weights`"),
        "_frozen": Hparam(
            False, is_frozen, f"what is not trained {of}: true, all but the head, a linear probe; `stages:3`, its start"
        ),
        "_input_size": Hparam(
            "auto", _SIDES, f"side in pixels to which the network {of} resizes what the student sees"
        ),
        "_steps": Hparam("auto", or_auto(number(1, integer=True)), f"updates {of}; `auto`: the run's own"),
        "_lr": Hparam(
            "auto",
            or_auto(number(0, open_low=True)),
            f"learning rate {of}; `auto`: the host's, or an `lr` that was given",
            is_optional=True,
        ),
        "_probe_steps": Hparam(
            0, number(0, integer=True), f"steps {of} in which its head alone is trained, first", is_optional=True
        ),
    }
    named = {slot.prefix + ending: hparam for ending, hparam in hparams.items()}
    # What describes a slot that few ask for stands in a run's hyperparameters only where it was given.
    return {name: replace(hparam, is_optional=True) for name, hparam in named.items()} if slot.asked_by else named
