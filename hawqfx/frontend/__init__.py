"""A model and data as hawqfx takes them in."""
