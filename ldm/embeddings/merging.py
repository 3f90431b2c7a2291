"""Merging several embedding files into one, and splitting one into several."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.embeddings.concept import Concept, EmbeddingError, LearnedEmbeddings, Metadata, quoted
from ldm.front_ends import setting
from ldm.outlines import Unread
from ldm.util import UsageError, shown
from ldm.words import NEGATIVE, check_word, cleaned, file_stem, own_words

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rename:
    """The trigger `old` of file number `index`, whose name is `source`, becomes `new`.

    Two files for the two encoders of SDXL count as one.
    """

    index: int
    source: str
    old: str
    new: str


def merge(
    parts: Sequence[LearnedEmbeddings],
    rename: Mapping[str, str | Sequence[str]] | None = None,
    automatic: bool = False,
) -> LearnedEmbeddings:
    """Merge embeddings; equal vectors with the same trigger are kept once.

    If all have the same progress, it is kept with the unused vectors; otherwise both are dropped and only the
    vectors in use are merged. `plan_renames` describes `rename` and `automatic`. Raises EmbeddingError, with the
    remedy, if two files have different vectors for one trigger or are for different text encoders.
    """
    if not parts:
        raise EmbeddingError("there is nothing to merge; name at least one file")
    parts = _with_common_progress(_joined(parts))
    _check_encoders(parts)
    plan = plan_renames(parts, rename, automatic)
    concepts: list[Concept] = []
    for index, part in enumerate(parts):
        names = {step.old: step.new for step in plan if step.index == index}
        for concept in part.renamed(names).concepts:
            same = [c for c in concepts if (c.trigger, c.encoder, c.part) == _key(concept)]
            if not same:
                concepts.append(concept)
    return LearnedEmbeddings(
        tuple(concepts),
        _common_metadata([part.metadata for part in parts]),
        parts[0].format,
        ", ".join(part.source for part in parts if part.source),
        parts[0].progress,
    )


def plan_renames(
    parts: Sequence[LearnedEmbeddings],
    rename: Mapping[str, str | Sequence[str]] | None = None,
    automatic: bool = False,
) -> list[Rename]:
    """Return the triggers that `merge` renames so that each is unique.

    Args:
        parts: the embeddings of each file.
        rename: a trigger's new name, or several. With n names, the last n files that have the trigger get them, in
            order; earlier files keep theirs.
        automatic: rename a trigger that is still not unique after its file, such as "<cat>" for cat.pt.

    The negative of a renamed word (see `ldm.words.NEGATIVE`) is renamed with it, also where it has a file of its own.

    Raises:
        EmbeddingError: a trigger is still not unique, or `rename` has more names than files with the trigger.
    """
    parts = _with_common_progress(_joined(parts))
    plan: list[Rename] = []
    for old, new in (rename or {}).items():
        names = [new] if isinstance(new, str) else list(new)
        holders = [index for index, part in enumerate(parts) if old in part.triggers]
        if not holders:
            held = quoted(list(dict.fromkeys(trigger for part in parts for trigger in part.triggers)))
            raise EmbeddingError(
                f"{setting('rename')} '{old}=...': there is no trigger '{old}'; there is {held}"
            )
        if len(names) > len(holders):
            raise EmbeddingError(
                f"{setting('rename')} '{old}=...' is given {len(names)} times; the trigger is in {len(holders)} files"
            )
        plan += [
            Rename(index, parts[index].source, old, name)
            for index, name in zip(holders[-len(names) :], names, strict=True)
        ]
    named = [step for step in plan for step in _of_negative(parts, step)]
    plan += [step for step in named if step.old not in (rename or {})]
    taken: dict[str, int] = {}
    for index, part in enumerate(parts):
        own = own_words(part.triggers)
        for trigger in own + [word for word in part.triggers if word not in own]:
            pair = [word for word in (trigger, f"{trigger}{NEGATIVE}") if word in part.triggers]
            clash = next((word for word in pair if _clashes(parts, plan, taken, index, word)), None)
            if clash is not None:
                name, other = _name(plan, index, trigger), parts[taken[_name(plan, index, clash)]]
                if not automatic or name != trigger:
                    # To rename the word renames its negative too.
                    raise EmbeddingError(
                        _clash(name if name in taken else _name(plan, index, clash), other, part)
                    )
                new = _free_name(part, {*taken, *(n for p in parts for n in p.triggers)})
                step = Rename(index, part.source, trigger, new)
                plan += [step, *_of_negative(parts, step)]
            taken.setdefault(_name(plan, index, trigger), index)
    return plan


def _name(plan: Sequence[Rename], index: int, trigger: str) -> str:
    """Return the name that a trigger of a file has after renaming."""
    return next((step.new for step in plan if (step.index, step.old) == (index, trigger)), trigger)


def _of_negative(parts: Sequence[LearnedEmbeddings], step: Rename) -> list[Rename]:
    """Return what renames the negative of a renamed word.

    It is in the word's file, or in a file without the word, which belongs to the nearest file before it that has the
    word without a negative, or to the first one after it.
    """
    old, new = f"{step.old}{NEGATIVE}", f"{step.new}{NEGATIVE}"
    holders = [index for index, part in enumerate(parts) if old in part.triggers]
    places = [index for index in holders if index == step.index]
    if not places:
        alone = [n for n, part in enumerate(parts) if step.old in part.triggers and n not in holders]
        apart = [index for index in holders if step.old not in parts[index].triggers]
        owner = {index: max((n for n in alone if n < index), default=alone[0]) for index in apart}
        places = [index for index in apart if owner[index] == step.index]
    return [Rename(index, parts[index].source, old, new) for index in places]


def _clashes(
    parts: Sequence[LearnedEmbeddings], plan: list[Rename], taken: Mapping[str, int], index: int, trigger: str
) -> bool:
    """Return whether the name of a trigger, after renaming, is taken by other vectors."""
    name = _name(plan, index, trigger)
    if name not in taken:
        return False
    return not _same_vectors(parts[taken[name]], plan, taken[name], name, parts[index], trigger)


def renames_from(texts: Sequence[str] | None) -> dict[str, list[str]]:
    """Return the `rename` argument of `merge` from texts "old=new" of a command line.

    Raises UserError for a text of another form or a name that is not allowed.
    """
    names: dict[str, list[str]] = {}
    for text in texts or ():
        old, equals, new = text.partition("=")
        if not (old and equals and new):
            raise UsageError(
                f"--rename '{shown(text)}': write it as old=new, for example --rename '*=<my-cat>'"
            )
        names.setdefault(cleaned(old), []).append(check_word(new, f"{setting('rename')} the new trigger"))
    return names


def split(embeddings: LearnedEmbeddings) -> list[LearnedEmbeddings]:
    """Return one LearnedEmbeddings for each trigger."""
    return [embeddings.only(trigger) for trigger in embeddings.triggers]


def _joined(parts: Sequence[LearnedEmbeddings]) -> list[LearnedEmbeddings]:
    """Return the parts; two with the same words for the two encoders of SDXL, as diffusers writes them, become one."""
    joined: list[LearnedEmbeddings] = []
    for part in parts:
        place = next((n for n, other in enumerate(joined) if _are_a_pair(other, part)), None)
        if place is None:
            joined.append(part)
        else:
            other = joined[place]
            concepts = (*other.concepts, *part.concepts)
            source = ", ".join(filter(None, (other.source, part.source)))
            joined[place] = dataclasses.replace(other, concepts=concepts, source=source)
    return joined


def _are_a_pair(first: LearnedEmbeddings, second: LearnedEmbeddings) -> bool:
    kinds = [{concept.encoder for concept in part.concepts} for part in (first, second)]
    of_both = kinds in ([{"clip_l"}, {"clip_g"}], [{"clip_g"}, {"clip_l"}])
    return of_both and first.triggers == second.triggers and first.progress == second.progress


def _with_common_progress(parts: Sequence[LearnedEmbeddings]) -> Sequence[LearnedEmbeddings]:
    """Return the parts unchanged if all have the same progress, else without progress and unused vectors."""
    if all(part.progress == parts[0].progress for part in parts):
        return parts
    return [part.without_progress() for part in parts]


def _key(concept: Concept) -> tuple[str, str | None, str]:
    return (concept.trigger, concept.encoder, concept.part)


def _same_vectors(
    first: LearnedEmbeddings,
    plan: list[Rename],
    index: int,
    name: str,
    second: LearnedEmbeddings,
    trigger: str,
) -> bool:
    """Return whether `name` in the first file, after renaming, and `trigger` in the second have equal vectors."""
    before = next((step.old for step in plan if step.index == index and step.new == name), name)
    ours = {(c.encoder, c.part): c for c in first.concepts if c.trigger == before}
    theirs = {(c.encoder, c.part): c for c in second.concepts if c.trigger == trigger}
    return ours.keys() == theirs.keys() and all(
        _equal(ours[key].vectors, theirs[key].vectors) and _equal(ours[key].unused, theirs[key].unused)
        for key in ours
    )


def _equal(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    if isinstance(first, Unread):
        return first.may_equal(second)
    if isinstance(second, Unread):
        return second.may_equal(first)

    import torch

    return torch.equal(first, second)


def _free_name(part: LearnedEmbeddings, taken: set[str]) -> str:
    stem, number = file_stem(Path(part.source).stem), 1
    while {name := f"<{stem}>" if number == 1 else f"<{stem}-{number}>", f"{name}{NEGATIVE}"} & taken:
        number += 1
    return name


def _clash(name: str, first: LearnedEmbeddings, second: LearnedEmbeddings) -> str:
    files = f"'{shown(first.source)}' and '{shown(second.source)}'" if first.source else "two of them"
    return f"{files} both have the trigger '{shown(name, 30)}'; rename one: {setting('renaming', shown(name, 30))}"


def _check_encoders(parts: Sequence[LearnedEmbeddings]) -> None:
    """Raise EmbeddingError if the parts are for different text encoders."""
    first = parts[0]
    for part in parts[1:]:
        widths, others = ({concept.width for concept in p.concepts} for p in (first, part))
        kinds, other_kinds = ({c.encoder for c in p.concepts} - {None} for p in (first, part))
        if widths != others or (kinds and other_kinds and kinds != other_kinds):
            raise EmbeddingError(
                f"'{shown(first.source)}' is for {first.concepts[0].models} and '{shown(part.source)}' for "
                f"{part.concepts[0].models}; embeddings of different text encoders cannot be used together"
            )


def _common_metadata(all_metadata: Sequence[Metadata]) -> Metadata:
    """Return the metadata in which all agree."""
    names = [field.name for field in dataclasses.fields(Metadata)]
    values = {name: {getattr(metadata, name) for metadata in all_metadata} for name in names}
    return Metadata(**{name: next(iter(found)) for name, found in values.items() if len(found) == 1})
