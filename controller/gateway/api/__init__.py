"""HTTP endpoints: what a request says, what an answer looks like, who may ask.

Imports `streams`, `routing` and `metrics`. Start reading in app.py, then completions.py.
"""
