"""Axes of the mesh, their degrees, and the process groups of their ranks."""
