"""Conversion to the model layouts of other libraries."""
