"""Sources of models and adapters: a directory, the Hugging Face hub.

Imports `adapters` and `model`. Start reading in adapters.py.

Tested elsewhere: hub in test_adapters.py.
"""
