"""Limits on what one grammar may cost, wherever it is compiled."""

from __future__ import annotations

from typing import Final

import llguidance

MAX_LEXER_STATES: Final = 20_000  # of up to 2 kB each


def parser_limits() -> llguidance.LLParserLimits:
    """Return the compiler's limits. One that is passed later, by a mask, ends only its own request."""
    return llguidance.LLParserLimits(
        initial_lexer_fuel=1_000_000,  # 20 ms
        step_lexer_fuel=100_000,  # 7 ms a token
        step_max_items=50_000,  # 3 ms a token
        max_lexer_states=MAX_LEXER_STATES,
        max_grammar_size=200_000,
        verbose_errors=False,
    )
