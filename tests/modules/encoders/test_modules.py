"""The encoders that YAML files name."""

from __future__ import annotations

import inspect

import pytest
import torch

from ldm.modules.encoders import modules as bert_module
from ldm.modules.encoders.base import PromptEncoder
from ldm.modules.encoders.modules import (
    BERTEmbedder,
    BERTTokenizer,
    ClassEmbedder,
    FrozenCLIPEmbedder,
    SpatialRescaler,
    TransformerEmbedder,
)
from ldm.modules.personalization import TextEncoder
from ldm.util import UserError
from tests.golden_record import GOLDEN, Golden


@pytest.mark.parametrize("encoder", [PromptEncoder, FrozenCLIPEmbedder, BERTEmbedder])
def test_the_protocol_alone_says_what_a_member_of_an_encoder_is(encoder):
    assert TextEncoder in encoder.__mro__
    for name in ("token_ids", "embed_ids", "encode", "width", "widths", "device", "token_embedding"):
        assert inspect.getdoc(getattr(encoder, name)) == inspect.getdoc(getattr(TextEncoder, name))
        held = vars(PromptEncoder).get(name)
        assert held is None or not held.__doc__, f"{name} is described twice"


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


TINY = str(GOLDEN / "bert_tiny_tokenizer")


def test_prompts_become_the_originals_ids():
    golden = Golden("bert_one_vector")
    tokenizer = BERTTokenizer(tokenizer=TINY, vq_interface=False)
    assert torch.equal(tokenizer.encode(golden.meta["prompts"]), golden.io["tokens"])
    assert tokenizer.decode(tokenizer("a dog")[0][:4]) == "[CLS] a dog [SEP]"


def test_as_a_first_stage_it_answers_with_codes_last():
    nothing, loss, (*_, ids) = BERTTokenizer(tokenizer=TINY).encode("a dog")
    assert nothing is None and loss is None and ids.shape == (1, 77)


def test_the_manager_sees_ids_and_token_embeddings_before_positions(bert):
    seen = []
    plain = bert("a dog")
    bert.embed_ids(bert.token_ids("a dog"), lambda ids, embedded: seen.append((ids, embedded)) or embedded)
    ids, embedded = seen[0]
    assert torch.equal(embedded, bert.token_embedding(ids))
    assert bert.width == 64 and plain.shape == (1, 77, 64)
    assert torch.equal(bert.encode(["a dog"]), plain)


def test_it_is_trained_whole_unless_frozen():
    encoder = BERTEmbedder(64, 1, vocab_size=135, tokenizer=TINY, embedding_dropout=0.5).train()
    assert not torch.equal(encoder("a dog"), encoder("a dog"))
    encoder("a dog").sum().backward()
    # the language-model head takes no part in a context
    untrained = {name for name, p in encoder.named_parameters() if p.grad is None}
    assert untrained == {"transformer.to_logits.weight", "transformer.to_logits.bias"}
    encoder.freeze()
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    assert torch.equal(encoder("a dog"), encoder("a dog"))


def test_token_ids_are_taken_as_they_are_without_tokenizer():
    encoder = BERTEmbedder(64, 1, vocab_size=135, max_seq_len=8, use_tokenizer=False)
    assert encoder(torch.tensor([[1, 2, 3]])).shape == (1, 3, 64)


def test_a_tokenizer_with_more_words_than_the_encoder_is_refused():
    with pytest.raises(UserError, match="ids up to 134 but the text encoder only 100 embeddings"):
        BERTEmbedder(64, 1, vocab_size=100, tokenizer=TINY)


def test_a_folder_without_vocabulary_and_a_hub_out_of_reach_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="the folder has no vocab.txt or tokenizer.json"):
        BERTTokenizer(tokenizer=str(tmp_path))
    with pytest.raises(UserError, match="tokenizer './absent': there is no such folder"):
        BERTTokenizer(tokenizer="./absent")

    def offline(*_, **__):
        raise OSError("offline\nmore")

    monkeypatch.setattr(bert_module.BertTokenizerFast, "from_pretrained", offline)
    with pytest.raises(UserError, match=r"'bert-base-uncased' is neither a folder here .*\(offline\)"):
        BERTTokenizer()


def test_a_tokenizer_without_words_is_not_made_up(monkeypatch):
    class Nothing:
        all_special_tokens = ("[PAD]", "[UNK]")

        def get_vocab(self):
            return {"[PAD]": 0, "[UNK]": 1}

    monkeypatch.setattr(bert_module.BertTokenizerFast, "from_pretrained", lambda *_: Nothing())
    with pytest.raises(UserError, match=r"hub \(it is not there, or .* connection\); go online"):
        BERTTokenizer()
