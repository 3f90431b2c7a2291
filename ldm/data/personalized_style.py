"""The dataset of textual inversion for a style: the same as for an object, with other sentences."""

from __future__ import annotations

from ldm import prompts
from ldm.data import personalized


class PersonalizedBase(personalized.PersonalizedBase):
    """Pictures in one style, with captions made from the style templates; parameters as for objects."""

    template_lines = prompts.STYLE_TEMPLATES
    dual_template_lines = prompts.STYLE_DUAL_TEMPLATES
