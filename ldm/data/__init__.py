"""Datasets, reached from the models through YAML only."""
