from __future__ import annotations

import pytest
import torch

from ldm.modules import attention as room
from ldm.modules.attention import attend


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_both_kernels_compute_softmax_attention(monkeypatch, limit: int) -> None:
    monkeypatch.setattr(room, "SHORT", limit)
    q, k, v = torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.einsum("bhnd,bhmd->bhnm", q, k).div(8**0.5).softmax(-1)
    torch.testing.assert_close(attend(q, k, v), torch.einsum("bhnm,bhmd->bhnd", weights, v))
