"""What the tests of evaluation share."""

import pytest
from tiny_lm import byte_tokenizer, tiny_module


@pytest.fixture(scope="session")
def lm():
    """A tiny Llama over bytes."""
    from clkit.models.causal_lm import CausalLM

    return CausalLM("tiny", tiny_module(), byte_tokenizer())
