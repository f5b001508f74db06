"""A model taken elsewhere: to open_clip, to ONNX, to safetensors with a card, to a hub."""
