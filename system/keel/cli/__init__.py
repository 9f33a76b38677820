"""The command line: one table of the commands that train, a function for each other one, and the doctor.

In: words a user typed. Out: exit code 0; 1 for a run that failed; 2 for bad input, told in one line; 130 when stopped.
Commands import what they need when they run, so that `keel --help` is quick.
Start reading at `main.py`; `training_commands.py` is what `keel train` and its like run.
"""
