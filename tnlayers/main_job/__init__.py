"""The main job, `tnlayers train`: dense nets, their conversions, tensor layers from scratch; one table, one page."""
