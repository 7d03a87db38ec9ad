"""What the capture of a CUDA graph changes is put back, and what cannot be captured is refused."""

import pytest
import torch
from torch import nn

from amortised.cuda import CapturedFunction, _put_back, _remember

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def test_what_a_capture_changed_is_put_back_in_place():
    table, old, new = torch.randn(4), nn.Linear(2, 1), nn.Linear(2, 1)
    optimizers = {network: torch.optim.Adam(network.parameters()) for network in (old, new)}
    state = {"table": table, "old": old, "new": new}
    state |= {"old's optimizer": optimizers[old], "new's optimizer": optimizers[new]}

    def change(network):
        network(torch.ones(1, 2)).sum().backward()
        optimizers[network].step()

    def moments(network):
        return [v for s in optimizers[network].state.values() for v in s.values()]

    change(old)  # has moments already, as after a checkpoint
    places = [table, *old.parameters(), *new.parameters(), *moments(old)]
    values = [place.detach().clone() for place in places]
    addresses = [place.data_ptr() for place in places]
    before = _remember(state)
    for _ in range(3):
        table.mul_(2.0)
        change(old)
        change(new)
    assert not any(torch.equal(a, b) for a, b in zip(places, values, strict=True))
    _put_back(state, before)
    assert all(torch.equal(a, b) for a, b in zip(places, values, strict=True))
    assert addresses == [place.data_ptr() for place in places]
    assert moments(new) and all((value == 0).all() for value in moments(new))


def test_what_cannot_be_captured_is_refused():
    with pytest.raises(TypeError, match=r"state\['scheduler'\] is a dict"):
        CapturedFunction(torch.mean, {"scheduler": {}})
    with pytest.raises(ValueError, match="needs tensors on a CUDA device; got one on cpu"):
        CapturedFunction(torch.mean)(torch.ones(3))


@needs_cuda
def test_each_shape_has_its_own_graph_and_four_are_kept():
    total = torch.zeros((), device="cuda")

    def add(x):
        total.add_(x.sum())
        return {"total": total + 0.0}

    captured, expected = CapturedFunction(add, {"total": total}), 0.0
    for n in (3, 5, 3, 7, 9, 11, 3):
        expected += n * n
        assert captured(torch.full((n,), float(n), device="cuda"))["total"].item() == expected
        assert len(captured._graphs) <= CapturedFunction.capacity


@needs_cuda
def test_draws_go_on_as_without_a_graph():
    captured = CapturedFunction(lambda x: x + torch.randn_like(x))
    x = torch.zeros(5, device="cuda")
    torch.cuda.manual_seed(1)
    plain = [x + torch.randn_like(x) for _ in range(3)]
    torch.cuda.manual_seed(1)
    assert all(torch.equal(captured(x), expected) for expected in plain)
