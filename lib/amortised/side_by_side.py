r"""Models that differ only in their seed, trained as one: several for little more than one's time.

A graphics card works through a step of a small network without being half busy. Here S networks
become one module, and their minibatches one batch of S equal *blocks* of neighbours; network s sees
block s alone. A training step, which knows of one model and one batch, then trains all of them.
They share no parameter, so the gradient of the mean loss over the batch is, for network s, that of
its own mean loss divided by S. Adam with :math:`\epsilon / S` in place of :math:`\epsilon` makes of
it the step that the network would have made alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .models import BernoulliDecoder

__all__ = ["BlockDecoder", "Blocks", "side_by_side"]


class Blocks(nn.Module):
    """S modules, each for its own block of a batch.

    :param members: modules that map ``[..., B, inputs]`` to ``[..., B, outputs]``.

    >>> blocks = Blocks([nn.Identity(), nn.ReLU()])
    >>> blocks(torch.full((4, 1), -1.0)).T
    tensor([[-1., -1.,  0.,  0.]])
    """

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, h: Tensor) -> Tensor:
        """Outputs ``[..., S B, outputs]`` for inputs ``[..., S B, inputs]``.

        :raises ValueError: when the batch cannot be cut into S equal blocks.
        """
        return _block_by_block(list(self.members), h)


class BlockDecoder(BernoulliDecoder):
    """S decoders of binary observations, each for its own block of latents ``[..., S B, D]``.

    Its chain and its likelihood are those of :class:`~amortised.models.BernoulliDecoder`. The route
    ``dense`` of :func:`amortised.fast.log_likelihood_and_grad` runs all of them in one batched
    product a layer.

    :param decoders: the decoders, of equal dimensions.
    """

    def __init__(self, decoders: Sequence[BernoulliDecoder]):
        super().__init__(
            nn.ModuleList(decoders), decoders[0].latent_dim, decoders[0].observation_dim
        )

    def logits(self, z: Tensor) -> Tensor:
        """Logits of the pixels: ``[..., S B, D] -> [..., S B, P]``.

        :raises ValueError: when the latents cannot be cut into S equal blocks.
        """
        return _block_by_block([decoder.logits for decoder in self.decoder], z)


def _block_by_block(functions: Sequence[Callable[[Tensor], Tensor]], h: Tensor) -> Tensor:
    size, rest = divmod(h.shape[-2], len(functions))
    if rest:
        raise ValueError(f"a batch of {h.shape[-2]} has no {len(functions)} equal blocks")
    blocks = zip(functions, h.split(size, dim=-2), strict=True)
    return torch.cat([function(block) for function, block in blocks], dim=-2)


def side_by_side(members: Sequence[nn.Module]) -> nn.Module:
    """One module out of S of a kind, each of which sees its own block of a batch.

    It behaves as a member does: a decoder is a decoder, an encoder an encoder, and so on. The
    members stay what they are, and training the one module trains them.

    :param members: decoders of binary observations, or modules made of children alone, such as the
        trunk and the head of an encoder or a discriminator.
    :raises TypeError: for modules of different kinds, or with parameters or buffers of their own.

    >>> from amortised.encoders import GaussianEncoder
    >>> members = [GaussianEncoder(2, nn.Identity(), num_features=3) for _ in range(2)]
    >>> x = torch.ones(5, 3)
    >>> q = side_by_side(members)(torch.cat([x, x]))
    >>> torch.equal(q.mean[5:], members[1](x).mean)
    True
    """
    kinds = {type(member).__name__ for member in members}
    if len(kinds) != 1:
        raise TypeError(f"modules side by side must be of one kind; got {', '.join(sorted(kinds))}")
    if isinstance(members[0], BernoulliDecoder):
        return BlockDecoder(members)
    own = [*members[0]._parameters, *members[0]._buffers]
    if own:
        raise TypeError(f"{kinds.pop()} has {', '.join(own)} outside of its children")
    joint = copy.deepcopy(members[0])
    for name, _ in members[0].named_children():
        setattr(joint, name, Blocks([getattr(member, name) for member in members]))
    return joint
