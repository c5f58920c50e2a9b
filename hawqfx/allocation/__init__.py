"""Budgets, the formats to choose from, what each limit counts, and the integer program that chooses."""
