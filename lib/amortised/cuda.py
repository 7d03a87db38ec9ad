r"""CUDA graphs: a function captured once, then replayed as one launch for hundreds.

Small networks spend most of their time on launching kernels. A graph launches them all at once.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .numerics import is_capturing

State = Mapping[str, Tensor | nn.Module | Optimizer]


class CapturedFunction:
    r"""Replay a function of CUDA tensors from CUDA graphs, one for each shape of its arguments.

    The function must always do the same on tensors of one shape, look at no value on the processor,
    and find whatever else it reads where it was: weights, for instance, are changed in place. A
    training step needs optimisers with ``capturable=True`` and their learning rate in a tensor on
    the device, where a schedule *outside* the function fills in new values. Draws from the global
    stream of the device go on as they would without a graph.

    At the first call with a shape, the function runs three times to warm up and is then captured.
    What it changed is put back, so that a training run is the one it would have been. Checks that
    need a value, such as that of :func:`amortised.mcmc.langevin_step`, see the warm-up alone:
    afterwards a position that is not finite shows in the losses. Inside the capture of a larger
    graph the function runs as it is and becomes part of that graph.

    :param function: maps CUDA tensors to a tensor, or to a tuple or dictionary of tensors. They are
        overwritten by the next call.
    :param state: everything that the function changes, by name: modules, optimisers and tensors.
    :raises TypeError: when an entry of ``state`` is something else.

    >>> mean = CapturedFunction(torch.mean)
    >>> mean(torch.ones(3))
    Traceback (most recent call last):
        ...
    ValueError: a CUDA graph needs tensors on a CUDA device; got one on cpu
    """

    capacity = 4  # graphs kept; a further shape takes the place of the oldest
    num_warm_up_calls = 3  # libraries choose algorithms and allocate workspaces there

    def __init__(self, function: Callable[..., Any], state: State | None = None):
        self.function, self.state = function, {} if state is None else state
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Any]] = {}
        _tensors(self.state)

    def __call__(self, *arguments: Tensor) -> Any:
        """What the function returns.

        :raises ValueError: when an argument is not on a CUDA device.
        """
        if is_capturing():
            return self.function(*arguments)
        for argument in arguments:
            if argument.device.type != "cuda":
                raise ValueError(
                    f"a CUDA graph needs tensors on a CUDA device; got one on {argument.device}"
                )
        key = tuple((argument.shape, argument.dtype) for argument in arguments)
        with torch.cuda.device(arguments[0].device):
            if key not in self._graphs:
                if len(self._graphs) == self.capacity:
                    self._graphs.pop(next(iter(self._graphs)))
                self._graphs[key] = self._capture(tuple(a.clone() for a in arguments))
            graph, fixed, results = self._graphs[key]
            for old, new in zip(fixed, arguments, strict=True):
                old.copy_(new)
            graph.replay()
        return results

    def _capture(
        self, fixed: tuple[Tensor, ...]
    ) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Any]:
        """A graph, and the places of its arguments and results."""
        before = _remember(self.state)
        random_state = torch.cuda.get_rng_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.num_warm_up_calls):
                self.function(*fixed)
        torch.cuda.current_stream().wait_stream(stream)
        _put_back(self.state, before)
        torch.cuda.set_rng_state(random_state)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = self.function(*fixed)
        return graph, fixed, results


def _tensors(state: State) -> dict[tuple, Tensor]:
    """All tensors of a state, where they are."""
    found: dict[tuple, Tensor] = {}
    for name, thing in state.items():
        if isinstance(thing, Tensor):
            found[name, ""] = thing
        elif isinstance(thing, nn.Module):
            found |= {(name, key): value for key, value in thing.state_dict().items()}
        elif isinstance(thing, Optimizer):
            for number, moments in enumerate(thing.state.values()):
                found |= {(name, number, key): value for key, value in moments.items()}
        else:
            kind = type(thing).__name__
            raise TypeError(f"state[{name!r}] is a {kind}, no tensor, module or optimiser")
    return found


def _remember(state: State) -> dict[tuple, Tensor]:
    return {key: value.detach().clone() for key, value in _tensors(state).items()}


@torch.no_grad()
def _put_back(state: State, before: Mapping[tuple, Tensor]) -> None:
    """Put tensors back in place. Moments that an optimiser did not have before are set to zero."""
    for key, value in _tensors(state).items():
        if key in before:
            value.copy_(before[key])
        else:
            value.zero_()
