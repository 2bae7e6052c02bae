"""Grids too large to hold: compressed to networks, coded, stored, decoded in parts, compared with their source."""
