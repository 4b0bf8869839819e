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

    def extend(self, x: Tensor, state: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Output for x, and the state after it: the last ``size - 1`` inputs.

        With ``cu_seqlens [N + 1]`` the batch of 1 holds N sequences end to end, each with its own state.
        """
        if cu_seqlens is not None:
            return self._extend_packed(x, state, cu_seqlens)
        inputs = torch.cat([state.to(x.dtype), x], 1)
        y = F.silu(super().forward(inputs.mT).mT)
        return y, inputs[:, inputs.shape[1] - state.shape[1] :]

    def _extend_packed(self, x: Tensor, state: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Tap by tap, so that lengths stay on the device: a token before the first of a sequence is in its state."""
        tokens, (N, past) = x[0], state.shape[:2]
        if len(tokens) == 0:
            return x, state
        index = torch.arange(len(tokens), device=x.device, dtype=cu_seqlens.dtype)
        sequence = torch.searchsorted(cu_seqlens[1:], index, right=True).clamp(max=N - 1)
        place = index - cu_seqlens[sequence]
        # Summed in float32 as a convolution is.
        wide = torch.promote_types(x.dtype, torch.float32)
        taps = self.weight[:, 0].to(wide).unbind(-1)
        y = tokens.to(wide) * taps[past]
        for back in range(1, past + 1):
            of_state = state[sequence, (place - back + past).clamp(0, past - 1)].to(x.dtype)
            earlier = torch.where((place >= back)[:, None], tokens.roll(back, 0), of_state)
            y = y + earlier.to(wide) * taps[past - back]
        last = cu_seqlens[1:, None] - past + torch.arange(past, device=x.device, dtype=cu_seqlens.dtype)
        place = last - cu_seqlens[:-1, None]
        rows = torch.arange(N, device=x.device)[:, None]
        of_state = state[rows, (place + past).clamp(0, max(0, past - 1))].to(x.dtype)
        end = torch.where((place >= 0)[..., None], tokens[last.clamp(0, len(tokens) - 1)], of_state)
        return F.silu(y.to(x.dtype))[None], end

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return self.extend(x, self.new_state(sequences), cu_seqlens)[0]
