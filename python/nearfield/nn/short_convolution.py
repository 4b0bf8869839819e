"""A causal convolution over a few tokens, channel by channel, that can go on where it stopped."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ShortConvolution(nn.Conv1d):
    """``[B, T, channels]`` to the same: each channel is mixed over the last ``size`` tokens, then SiLU.

    Lets a token look at its predecessors before keys are compared, without which linear attention cannot store a
    value under the token before it. The weight ``[channels, 1, size]`` is that of fla's layer of this name.
    """

    def __init__(self, channels: int, size: int) -> None:
        if size < 1:
            raise ValueError(f"ShortConvolution: size is {size}, expected at least 1")
        super().__init__(channels, channels, size, groups=channels, bias=False)

    def new_state(self, batch: int) -> Tensor:
        """What precedes the first token: zeros, ``[batch, size - 1, channels]``."""
        return self.weight.new_zeros(batch, self.kernel_size[0] - 1, self.in_channels)

    def extend(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Output for x, and the state after it: the last ``size - 1`` inputs."""
        inputs = torch.cat([state.to(x.dtype), x], 1)
        y = F.silu(super().forward(inputs.mT).mT)
        return y, inputs[:, inputs.shape[1] - state.shape[1] :]

    def forward(self, x: Tensor) -> Tensor:
        return self.extend(x, self.new_state(x.shape[0]))[0]
