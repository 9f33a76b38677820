"""Reading what runs left behind: compare, report, verify, replay, plan. Trains nothing.

In: run directories, or settings and measured rates. Out: tables, plots, verdicts.
Every command here works on a run that is finished, stopped or still running.
Start reading at `compare.py` (reward over KL of several runs), `report.py` (one HTML page; its sentences are in
`report_words.py`), `verify.py` (is a run whole?), `plan.py` (how fast?).
"""
