"""A model taken elsewhere: to open_clip, to ONNX, to safetensors with a card, to a hub."""

FORMATS = ("open_clip", "onnx", "safetensors")
"""What a model can be exported to."""
