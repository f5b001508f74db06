"""Search over embeddings: an index on disk, what its rows are, and pages of what was found."""

KINDS = ("auto", "exact", "approximate")
"""What an index can be asked to be."""
