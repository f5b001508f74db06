"""Data: sources -> tar shards -> index -> sample order -> batch; text hash table; prompts."""
