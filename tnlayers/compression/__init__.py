"""Calibrated compression of pretrained models: what layers saw, what their weights can become, and the choice."""
