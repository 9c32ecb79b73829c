"""The command line's vocabulary: how text of a command line becomes values, and what is said of text that does not.

Imports `workers.options`, which declares each option. Start reading in flags.py.
"""
