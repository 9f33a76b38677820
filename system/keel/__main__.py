"""`keel` and `python -m keel`."""

import sys

if __name__ == "__main__" and __spec__ is not None and not sys.flags.safe_path:
    # -m put the current directory in front of installed code: a pyarrow.py that lies there must not run. First of all
    # imports, all of which would look there.
    del sys.path[0]

from keel.cli.main import main

if __name__ == "__main__":
    main()
