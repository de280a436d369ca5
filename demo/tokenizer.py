"""The zoo's tokenizer: bytes, and one token for each tag and for the answer mark.

Every text can be encoded; a letter is always one token, so that the skills, which work on letters,
are learned in minutes.
"""

from __future__ import annotations

from skills import BASE_SKILLS, PLAIN
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"


def build() -> PreTrainedTokenizerFast:
    """pad, bos, eos, 256 bytes, then the tags with their space (``sort: ``) and `` =``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([PAD, BOS, EOS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, BOS, EOS])
    tags = [f"{tag}: " for tag in (PLAIN, *BASE_SKILLS)]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (*tags, " =")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocab[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
