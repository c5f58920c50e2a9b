"""The passes, a file each, named as on the command line."""
