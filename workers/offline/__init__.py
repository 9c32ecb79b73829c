"""The library without a server: `LLM`, `LLMEngine` and `AsyncLLM`, with the signatures of vLLM's.

Imports `engine` and `text`. Start reading in llm.py.

Tested elsewhere: args, llm_engine, outputs and text_requests in test_llm.py.
"""
