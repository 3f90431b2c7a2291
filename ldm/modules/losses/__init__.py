"""Losses of the first stages, under the names that YAMLs use."""

from ldm.modules.losses.first_stage import LPIPSWithDiscriminator, VQLPIPSWithDiscriminator

__all__ = ["LPIPSWithDiscriminator", "VQLPIPSWithDiscriminator"]
