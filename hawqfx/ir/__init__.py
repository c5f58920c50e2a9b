"""The program that flows through the passes: graph, sites, facts, operators."""
