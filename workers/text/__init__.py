"""Text at the edge of the fleet: tokenizer, chat template, incremental detokenizer, stop strings.

Shared by the HTTP gateway and the offline ``LLM``. Imports tokenizers, jinja2 and the standard library; never torch,
transformers or Ray (transformers' tokenizers would load torch: 222 MB and seconds of start-up).

Tested elsewhere: generation_defaults in test_model_text.py; pieces in test_detokenizer.py; template_filters in
test_traced_text.py; template_sandbox in test_chat_template.py.
"""

from __future__ import annotations

from lorafleet.workers.text.chat_template import ChatTemplate
from lorafleet.workers.text.detokenizer import IncrementalDetokenizer
from lorafleet.workers.text.output import Delta, OutputText
from lorafleet.workers.text.stop import StopMatcher
from lorafleet.workers.text.tokenizer import TOKENIZER_FILES, Tokenizer

__all__ = [
    "TOKENIZER_FILES",
    "ChatTemplate",
    "Delta",
    "IncrementalDetokenizer",
    "OutputText",
    "StopMatcher",
    "Tokenizer",
]
