"""The command line's vocabulary: how its text becomes values, and the errors for text that does not.

Imports `workers.options`, which declares each option. Start reading in flags.py.
"""
