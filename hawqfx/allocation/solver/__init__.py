"""The integer program: relaxation, cores that grow, HiGHS and CP-SAT."""
