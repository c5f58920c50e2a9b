"""python -m hawqfx, and torchrun -m hawqfx."""

from hawqfx.cli import main

main()
