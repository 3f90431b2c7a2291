"""A training run: from flags and YAMLs to a run folder with embeddings."""
