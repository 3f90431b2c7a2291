from __future__ import annotations

import pytest
import torch

from ldm.modules.encoders.modules import ClassEmbedder, SpatialRescaler, TransformerEmbedder
from ldm.util import UserError


def test_classes_become_contexts_of_one_vector():
    embedder = ClassEmbedder(8, n_classes=5)
    batch = {"class": torch.tensor([1, 4]), "other": torch.tensor([0, 0])}
    assert torch.equal(embedder(batch)[:, 0], embedder.embedding.weight[[1, 4]])
    assert torch.equal(embedder(batch, key="other")[0, 0], embedder.embedding.weight[0])
    assert list(embedder.state_dict()) == ["embedding.weight"]


def test_images_are_scaled_stage_by_stage_and_channels_mapped():
    x = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 3, 4, 4)
    assert SpatialRescaler(n_stages=0)(x) is x
    assert SpatialRescaler(n_stages=2).encode(x).flatten().tolist() == [7.5] * 3
    mapper = SpatialRescaler(out_channels=5, bias=True)
    assert mapper(x).shape == (1, 5, 2, 2)
    assert set(mapper.state_dict()) == {"channel_mapper.weight", "channel_mapper.bias"}
    assert not SpatialRescaler().state_dict()


def test_a_rescaler_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="unknown method 'cubic'; use one of nearest"):
        SpatialRescaler(method="cubic")
    with pytest.raises(UserError, match="n_stages is -1"):
        SpatialRescaler(n_stages=-1)


def test_ids_go_through_a_transformer():
    embedder = TransformerEmbedder(16, 1, vocab_size=7, max_seq_len=4, device="cuda")
    assert embedder.encode(torch.tensor([[1, 2, 3, 4]])).shape == (1, 4, 16)
    assert "transformer.attn_layers.layers.1.1.net.2.weight" in embedder.state_dict()
