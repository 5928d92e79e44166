"""The stages of a network: what its first ones give, and how the others go on from that."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile

import torch
from torch import Tensor, nn

from daft_domainbed.errors import UsageError

# What the part of a network is called that holds its stages one after the other.
_TRUNKS = ("blocks", "stages", "features", "trunk_output", "layers")

Encode = Callable[[Tensor], Tensor]


class _Reached(Exception):
    """The last stage of a prefix has answered."""

    def __init__(self, activation: Tensor) -> None:
        super().__init__()
        self.activation = activation


class Prefix:
    """A network's stem and first stages, which compute apart from the others.

    Args:
        network: Whose stages are `layer1`, `layer2`, ..., or the parts of `blocks`, `stages`, `features`,
            `trunk_output` or `layers`; the first part of `features` is the stem.
        n_stages: How many of them.

    Raises:
        UsageError: It has no stages, or fewer.
    """

    def __init__(self, network: nn.Module, n_stages: int) -> None:
        stem, stages = _list_stages(network)
        if n_stages > len(stages):
            raise UsageError(f"stages:{n_stages}: the network has {len(stages)} stages to freeze: name fewer, or true")
        self.network, self.stages = network, stages[:n_stages]
        self.modules = [*stem, *self.stages]
        self.shape: torch.Size | None = None  # of an image's activation

    def compute(self, x: Tensor, encode: Encode) -> Tensor:
        """Return what the last stage gives for images, [B, ...], as rows, [B, N].

        Args:
            x: Images.
            encode: Runs the whole network, which is left once that stage has answered.
        """

        def leave(module: nn.Module, inputs: object, output: Tensor) -> None:
            raise _Reached(output)

        hook = self.stages[-1].register_forward_hook(leave)
        try:
            encode(x)
        except _Reached as reached:
            self.shape = reached.activation.shape[1:]
            return reached.activation.flatten(1)
        finally:
            hook.remove()
        raise UsageError("a network's stages are not part of its forward pass: freeze all of it, or none")

    def go_on(self, rows: Tensor, x: Tensor, encode: Encode) -> Tensor:
        """Return the features, [B, D], of images whose activations are known.

        Args:
            rows: What `compute` gave, [B, N].
            x: Images; one of them goes through the stem for form's sake.
            encode: Runs the whole network.
        """
        assert self.shape is not None
        with _standing_in(self.stages, rows.unflatten(1, self.shape)):
            return encode(x[:1])

    def get_state(self) -> dict[str, Tensor]:
        """Return the weights and statistics that its activations depend on."""
        names = {id(module): name for name, module in self.network.named_modules()}
        own = tuple(f"{names[id(module)]}." for module in self.modules)
        # What belongs to the network itself, such as an embedding of positions, is added before the first stage.
        return {
            name: value for name, value in self.network.state_dict().items() if name.startswith(own) or "." not in name
        }


def _list_stages(network: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the modules of a network's stem, and its stages, in the order in which they compute."""
    children = dict(network.named_children())
    layers = [name for name in children if re.fullmatch(r"layer\d+", name)]
    trunks = [name for name in _TRUNKS if isinstance(children.get(name), nn.Sequential | nn.ModuleList)]
    trunks += [name for name in _TRUNKS if name in children and name not in trunks]
    if not layers and not trunks:
        raise UsageError("this backbone has no stages that could be frozen: freeze all of it (true), or none")
    first = layers[0] if layers else trunks[0]
    stages = [children[name] for name in layers] or list(children[first].children())
    stem = [children[name] for name in takewhile(lambda name: name != first, children)]
    if first == "features":
        return [*stem, stages[0]], stages[1:]
    return stem, stages


@contextmanager
def _standing_in(stages: list[nn.Module], activation: Tensor) -> Iterator[None]:
    """Have an activation stand in for the stages that gave it."""
    for stage in stages[:-1]:
        stage.forward = lambda x, *_, **__: x
    stages[-1].forward = lambda *_, **__: activation
    try:
        yield
    finally:
        for stage in stages:
            del stage.forward
