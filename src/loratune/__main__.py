"""`python -m loratune`, as torchrun calls it."""

from loratune.cli.main import main

main()
