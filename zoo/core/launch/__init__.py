"""Processes start, meet, hear signals, are watched, and end."""
