"""Datasets; models use them through the YAML only."""
