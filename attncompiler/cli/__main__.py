"""`python -m attncompiler.cli`, where the entry point is not on the path."""

from attncompiler.cli import main

if __name__ == "__main__":
    main()
