"""Measuring sensitivities: probes, stopping, memory, the cache, processes."""
