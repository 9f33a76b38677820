"""Objectives: `kinds.py` has them by name, `objective.py` is their frame, `credit.py` what passes to and from them."""
