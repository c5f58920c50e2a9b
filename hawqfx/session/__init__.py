"""A measured network and the compiled ones made of it: plans, budgets on latency and accuracy, the frontier."""
