"""``python -m cfvit``, as torchrun needs it."""

from cfvit.cli import main

main()
