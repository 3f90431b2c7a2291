"""A training run: flags and YAMLs in, a run folder with embeddings out."""
