"""What stands behind each command of the command line; hawqfx.cli puts them together."""
