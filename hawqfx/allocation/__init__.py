"""Budgets, the formats to choose from, the resource of each limit, and the integer program that chooses."""
