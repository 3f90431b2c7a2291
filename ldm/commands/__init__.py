"""The commands of a user: argument parsing, checks and one call each."""
