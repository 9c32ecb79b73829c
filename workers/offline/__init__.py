"""The library without a server: `LLM`, `LLMEngine` and `AsyncLLM`, with vLLM's signatures.

Imports `engine` and `text`. Start reading in llm.py.

Tested elsewhere: llm_engine, outputs and text_requests in test_llm.py.
"""
