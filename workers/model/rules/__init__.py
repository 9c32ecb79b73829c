"""What changes logits before sampling: one rule a file, all through one seam (rule.py).

Owns: which rows a rule concerns and what it writes for them (changes.py). Leaves to others: the arithmetic
(kernels/logit_changes.py), the options' ranges (scheduling/sampling_options.py), when a step waits for tokens
(engine/loop.py).
"""
