"""What happens around the steps of a run: previews, saving, progress, signals."""
