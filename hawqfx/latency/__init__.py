"""The time that the parts of a network take on this machine."""
