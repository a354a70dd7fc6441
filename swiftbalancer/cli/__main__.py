"""`python -m swiftbalancer.cli`."""

from swiftbalancer.cli.app import main

main()
