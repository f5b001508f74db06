"""Measurements side by side with the peers; `python -m benchmarks` lists them."""

NAMES = (
    *("loss", "text", "coswin", "coswin3d", "step", "gradient_cache", "distributed", "zero_memory"),
    *("cli", "loader", "clips", "inflation", "zero_shot", "linear_probe", "retrieval", "search"),
    *("dynamic_head", "detection", "co_attention", "question_answering", "demo", "gpu"),
)
