"""The operations in Triton. Start reading in lora.py.

Tested elsewhere: activation in kernels/test_activation.py; attention in kernels/test_attention.py; device in
test_lora.py; norm in kernels/test_norm.py; rope in kernels/test_rope.py.
"""
