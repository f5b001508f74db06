"""Detection: Dynamic Head with ATSS on a pretrained tower, by names or by class numbers."""
