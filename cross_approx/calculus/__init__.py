"""What is done with a network over a grid, without the grid: functions, integrals, extrema, samples, finer grids."""
