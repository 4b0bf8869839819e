"""The delta rule in chunks of 64 tokens in float64: a reference for lengths where the token loop takes too long."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from nearfield.delta import delta_rule_reference
from torch import Tensor

CHUNK = 64
LOWEST_GATE = -1e4  # exp of it is 0; -inf would have no differences


def recurrence_by_chunks(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float, S: Tensor
) -> tuple[Tensor, Tensor]:
    """Takes the place of the token recurrence of ``nearfield.delta.reference``; same shapes."""
    outputs = [v.new_zeros(*v.shape[:2], 0, v.shape[3])]
    for start in range(0, q.shape[2], CHUNK):
        rows = slice(start, start + CHUNK)
        q_c, k_c, v_c, beta_c = q[:, :, rows], k[:, :, rows], v[:, :, rows], beta[:, :, rows, None]
        G = k_c.new_zeros(*k_c.shape[:3], 1)
        if g is not None:
            G = g[:, :, rows].clamp_min(LOWEST_GATE).cumsum(2)
        n = k_c.shape[2]
        lower = torch.ones(n, n, dtype=torch.bool, device=k.device).tril()
        difference = (G.unsqueeze(3) - G.unsqueeze(2)).masked_fill(~lower[..., None], -torch.inf)
        decay = difference.exp().expand(-1, -1, -1, -1, k.shape[3])
        A = beta_c * torch.einsum("bhic,bhijc,bhjc->bhij", k_c, decay, k_c)
        P = torch.einsum("bhic,bhijc,bhjc->bhij", q_c, decay, k_c)
        R = v_c - (k_c * G.exp()) @ S
        V_new = torch.linalg.solve_triangular(A, beta_c * R, upper=False, unitriangular=True)
        outputs.append(scale * ((q_c * G.exp()) @ S + P @ V_new))
        end = G[:, :, -1:]
        S = end.exp().transpose(-1, -2) * S + (k_c * (end - G).exp()).transpose(-1, -2) @ V_new
    return torch.cat(outputs, 2), S


def delta_rule_by_chunks(**args: Any) -> tuple[Tensor, Tensor | None]:
    """:func:`nearfield.delta.delta_rule_reference`, chunk by chunk."""
    with patch("nearfield.delta.reference.recurrence", recurrence_by_chunks):
        return delta_rule_reference(**args)
