"""What a model can do: zero-shot classification, retrieval, and the report that shows it."""
