"""The operations of a step: in C++ for CPUs, in Triton for GPUs, and in torch as the reference of both.

Imports torch and Triton, and nothing of ours. Start reading in dispatch.py, then lora.py.

Tested elsewhere: cache in test_build.py; dispatch in test_norm.py.
"""
