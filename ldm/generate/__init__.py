"""Images from prompts, with a model and learned embeddings."""

from ldm.generate.embeddings import check_mentions, check_prompts, load_embeddings
from ldm.generate.images import SAMPLERS, check_settings, generate

__all__ = ["SAMPLERS", "check_mentions", "check_prompts", "check_settings", "generate", "load_embeddings"]
