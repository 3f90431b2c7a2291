"""Callbacks of a training run: previews, saving, measurements, progress and signals."""
