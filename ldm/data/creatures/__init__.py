"""The small procedural world on which the embedded model is trained: seeded creatures, pictures and captions."""
