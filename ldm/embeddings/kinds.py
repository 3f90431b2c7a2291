"""Text encoders that embedding vectors belong to, told by width where the width is enough."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A text encoder: its width, the models that have it, and what ModelSpec calls such a model."""

    width: int
    models: str
    architecture: str
    resolution: int


KINDS = {
    "clip_l": Kind(768, "Stable Diffusion 1.x, or the first encoder of SDXL", "stable-diffusion-v1", 512),
    "clip_h": Kind(1024, "Stable Diffusion 2.x", "stable-diffusion-v2-512", 512),
    "clip_g": Kind(1280, "the second encoder of SDXL", "stable-diffusion-xl-v1-base", 1024),
    "bert": Kind(1280, "latent diffusion text2img-large (BERT)", "latent-diffusion-bert", 256),
    "t5": Kind(4096, "the T5-XXL encoder of SD3 and Flux", "t5-xxl", 1024),
}

# A CLIP or BERT text encoder of a width that no published model has, such as that of the embedded model.
FAMILIES = {"clip": "latent-diffusion-clip", "bert": "latent-diffusion-bert"}


def encoder_kind(family: str, width: int) -> str:
    """The kind of an encoder of this family ("clip" or "bert") and width: 768 of clip is "clip_l"."""
    exact = [name for name, kind in KINDS.items() if kind.width == width and name.startswith(family)]
    return exact[0] if exact else family


def known_kind(width: int) -> str | None:
    """The only kind of this width; None if there is none, or several (1280: BERT of LDM, clip_g of SDXL)."""
    names = [name for name, kind in KINDS.items() if kind.width == width]
    return names[0] if len(names) == 1 else None


def fits(encoder: str, width: int) -> bool:
    """Whether vectors of this width can belong to this kind of encoder."""
    if encoder in FAMILIES:
        return True
    return encoder in KINDS and KINDS[encoder].width == width


def is_ambiguous(encoder: str | None, width: int) -> bool:
    return encoder is None and sum(kind.width == width for kind in KINDS.values()) > 1


def models_of(encoder: str | None, width: int) -> str:
    """In words, the models that vectors of this width (and kind, if it is known) were made for."""
    if encoder in KINDS and KINDS[encoder].width == width:
        return KINDS[encoder].models
    fitting = [kind.models for kind in KINDS.values() if kind.width == width]
    if fitting and encoder is None:
        return " or ".join(fitting)
    family = {"clip": "CLIP ", "bert": "BERT "}.get(encoder or "", "")
    return f"a model whose {family}text encoder is {width} wide"


def architecture_of(encoder: str | None, width: int) -> str:
    """The ModelSpec architecture of an embedding for this encoder."""
    if encoder in KINDS and KINDS[encoder].width == width:
        return f"{KINDS[encoder].architecture}/textual-inversion"
    return f"{FAMILIES.get(encoder or '', 'latent-diffusion')}/textual-inversion"


def kind_of_architecture(architecture: str, width: int) -> str | None:
    """The kind that a ModelSpec architecture names, if the width agrees."""
    model = architecture.split("/")[0]
    if model == FAMILIES["bert"]:
        return "bert"
    if model == FAMILIES["clip"]:
        return "clip"
    if model.startswith("stable-diffusion-xl"):
        return {768: "clip_l", 1280: "clip_g"}.get(width)
    return known_kind(width)
