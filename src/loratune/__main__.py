"""`python -m loratune`, as torchrun calls it."""

from loratune.cli import main

main()
