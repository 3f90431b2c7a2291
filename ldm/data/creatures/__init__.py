"""The procedural world that the embedded model is trained on: creatures from seeds, their images and captions."""
