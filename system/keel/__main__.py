"""`keel` and `python -m keel`."""

from keel.cli import main

if __name__ == "__main__":
    main()
