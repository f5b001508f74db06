"""Video: 3D-CoSwin, action recognition, text-to-video retrieval (Florence 2.6, 3.8, 3.9)."""
