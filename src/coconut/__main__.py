"""`python -m coconut`: the command `coconut` without its console script."""

from coconut.cli import main

if __name__ == "__main__":
    main()
