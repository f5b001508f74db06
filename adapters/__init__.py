"""Plug-ins that adapt pretrained towers to other jobs."""
