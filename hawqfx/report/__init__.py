"""The report: a self-contained page that shows a compiled network."""
