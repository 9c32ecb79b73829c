"""Structured output before the engine: what a caller asks for as one grammar text, checked within bounds.

A grammar text is Lark in llguidance's dialect, in which JSON schemas and regular expressions stand too. Gateways and
the offline `LLM` make and check it; workers compile it against a vocabulary (workers/engine/grammars.py). No torch.

Tested elsewhere: check_process and limits in test_check.py.
"""
