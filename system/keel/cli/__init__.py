"""The command line: one function a command, tables on the terminal, the doctor.

In: words a user typed. Out: exit code 0; 1 for a run that failed; 2 for bad input, told in one line; 130 when stopped.
Commands import what they need when they run, so that `keel --help` is quick.
Start reading at `main.py`.
"""
