"""The dataset of textual inversion for a style: as for an object, with other templates."""

from __future__ import annotations

from ldm import prompts
from ldm.data import personalized


class PersonalizedBase(personalized.PersonalizedBase):
    """Images in one style, with captions made from the style templates; the parameters are those for objects."""

    template_lines = prompts.STYLE_TEMPLATES
    dual_template_lines = prompts.STYLE_DUAL_TEMPLATES
