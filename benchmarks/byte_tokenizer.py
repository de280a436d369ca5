"""A tokenizer for models of random numbers: it needs no vocabulary of anybody's."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Bytes, special tokens, and names for the rest of the ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<unk>", "<s>", "</s>", "<pad>", *alphabet]
    names += [f"<{i}>" for i in range(len(names), vocabulary)]
    made = Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
