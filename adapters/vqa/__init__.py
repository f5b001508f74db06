"""Question answering: METER's co-attention over the two towers, and captions (Florence 2.5)."""
