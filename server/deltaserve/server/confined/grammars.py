"""The limits under which grammars are compiled and followed, here and in the server's process."""

from __future__ import annotations

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_LEXER_STATES = 20_000
"""Of one grammar; a state takes 1 to 2 kB. A JSON schema makes some hundreds."""


def compiled(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """Errors are in the result (`get_error`). May take very long, and overflow the stack on rules
    nested some thousand deep: only for what a `Helper` has compiled. Every later step is bounded,
    by the library's own limits, to some milliseconds."""
    limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
    return LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
