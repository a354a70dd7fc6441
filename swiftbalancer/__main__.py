"""`python -m swiftbalancer`: the command, where its script is not on the path."""

from swiftbalancer.cli import main

main()
