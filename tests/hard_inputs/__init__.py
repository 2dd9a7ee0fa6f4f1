"""Inputs that broke tools of this kind in the field, each tried on this one; `run.py` prints the table."""
