"""Sources of models and adapters: a directory, the Hugging Face hub.

Imports `adapters` and `model`. Start reading in adapters.py.

Tested elsewhere: demo in deploy/test_kubernetes.py; hub in test_adapters.py.
"""
