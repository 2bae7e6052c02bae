"""Pretrained models of transformers and timm: opened, saved with their networks, exported as plain ones."""
