"""A negative word learned beside each word (DreamArtist)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.personalization import TextEncoder
from ldm.modules.prompt_tokenizer import check_placeholders
from ldm.util import UserError, check_integer, shown
from ldm.words import NEGATIVE, vector_counts


class DreamArtist(EmbeddingManager):
    """Vectors of a word and of its negative, trained together through guidance (Dong et al. 2022, arXiv 2211.11337).

    A training step denoises with the output under the negative plus `guidance` times its difference from the output
    under the caption, which takes the denoiser twice. The negative of `cat` is the word `cat-neg`; both are ordinary
    vectors in the files, and wherever `cat` is in a prompt, `cat-neg` joins the negative prompt.

    The authors' code trains the negative in the caption, in place of the word; here it stands alone, in training as in
    generation, so that guidance still has the rest of a prompt to go by. Their optional loss on pixels is left out.

    Args:
        placeholder_strings: the words to learn, without their negatives.
        num_vectors_per_token: of these words, as in `EmbeddingManager`; the paper has 3.
        negative_vectors: vectors of each negative; they begin at random.
        guidance: the guidance scale of training; 3 to 5 in the paper.
        negative_rate: the learning rate of the negatives; by default that of the run (`scale_lr`
            does not multiply it).
        vectors: see `EmbeddingManager`.
    Raises:
        UserError: a value is not possible; and what EmbeddingManager raises.
    """

    def __init__(
        self,
        embedder: TextEncoder,
        placeholder_strings: Sequence[str] | str | None = None,
        num_vectors_per_token: int | Sequence[int] | Mapping[str, int] = 1,
        negative_vectors: int = 3,
        guidance: float = 3.0,
        negative_rate: float | None = None,
        **vectors: Any,
    ) -> None:
        check_integer(negative_vectors, "personalization_config: negative_vectors")
        if not 1 < guidance <= 20:
            raise UserError(
                f"personalization_config: guidance is {guidance}; use a number above 1, such as 3"
            )
        if negative_rate is not None and not negative_rate > 0:
            raise UserError(
                f"personalization_config: negative_rate is {negative_rate}; it must be above 0, or null"
            )
        given = [placeholder_strings] if isinstance(placeholder_strings, str) else placeholder_strings or ()
        positive = check_placeholders(given, embedder.prompt_tokenizer)
        for word in positive:
            if word.endswith(NEGATIVE):
                raise UserError(
                    f"placeholder_strings: '{shown(word)}' is the name of a negative; name only the words themselves"
                )
        negative = [f"{word}{NEGATIVE}" for word in positive]
        limit = embedder.max_length - 2
        counts = vector_counts(positive, positive, num_vectors_per_token, limit)
        counts |= dict.fromkeys(negative, negative_vectors)
        self.training_guidance, self.negative_rate = float(guidance), negative_rate
        super().__init__(
            embedder, placeholder_strings=[*positive, *negative], num_vectors_per_token=counts, **vectors
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The words, and their negatives, with a rate of their own if there is one."""
        (whole,) = super().parameter_groups()
        groups: list[dict[str, Any]] = [
            {**whole, "params": [], "name": name} for name in ("words", "negatives")
        ]
        for word in self.string_to_token_dict:
            parameters: list[nn.Parameter] = groups[word.endswith(NEGATIVE)]["params"]
            parameters.append(self.vectors(word))
        if self.negative_rate is not None:
            groups[1]["lr"] = self.negative_rate
        return groups
