"""The trainer and what it stands on. Knows no contrastive learning: it runs a task."""
