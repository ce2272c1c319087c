"""Repair of how transformers reads a SentencePiece model without tokenizer.json.

transformers 5.19 reads such a model differently from the SentencePiece library, with which it was trained, and gives no warning:
- It orders BPE merges by piece id; SentencePiece orders them by score. The orders differ for Llama's and Mistral's runs of spaces, whose
  score is −1e9.
- It adds no space before a text that begins with one; SentencePiece adds one before every text.
Can be removed once transformers follows SentencePiece.
"""

from pathlib import Path
from typing import TYPE_CHECKING, cast

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.tokenizer_probes import PROBES, Reading, first_difference

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


def repair_sentencepiece(tokenizer: "PreTrainedTokenizerBase", read: Reading, model_file: Path, legacy: bool) -> None:
    """Make `tokenizer`, which transformers made from the SentencePiece `model_file`, read text as that model does, and compare the two.

    read: how `tokenizer` reads text. legacy: whether tokenizer_config.json leaves `legacy` true, its default, which also adds a space after
    special tokens. If false, texts that begin with a space stay as transformers reads them, because it can add a space before these only
    together with the others. A Unigram model is compared, not repaired.
    Raises UserError if they still differ: training would see tokens that the model does not know.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers.models import BPE
    from tokenizers.normalizers import Prepend, Replace, Sequence

    processor = SentencePieceProcessor(model_file=str(model_file))
    backend = cast("Tokenizer", tokenizer.backend_tokenizer)
    if isinstance(backend.model, BPE):
        backend.model = BPE(
            vocab={processor.id_to_piece(i): i for i in range(processor.get_piece_size())},
            merges=_merges_by_score(processor),
            unk_token=processor.id_to_piece(processor.unk_id()),
            byte_fallback=any(processor.is_byte(i) for i in range(processor.get_piece_size())),
            fuse_unk=True,
        )
    expected = Reading(processor.encode, processor.decode, processor.id_to_piece)
    texts = PROBES if legacy else [text for text in PROBES if not text.startswith(" ")]
    difference = first_difference(expected, read, texts)
    if difference and isinstance(backend.model, BPE):
        backend.normalizer, backend.pre_tokenizer = Sequence([Prepend("▁"), Replace(" ", "▁")]), None
        difference = first_difference(expected, read, texts)
    if difference:
        raise UserError(
            f"{model_file}: transformers does not read it as SentencePiece does: {difference}; set tokenizer_class in "
            "tokenizer_config.json, or add the model's tokenizer.json"
        )


def _merges_by_score(processor) -> list[tuple[str, str]]:
    """Return every pair of pieces that joins to a piece, by descending score of the joined piece; unreachable pieces are left out."""
    size = processor.get_piece_size()
    joined = {
        processor.id_to_piece(i): processor.get_score(i)
        for i in range(size)
        if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i) or processor.is_unused(i))
    }
    merges = [
        (-score, piece[:cut], piece[cut:])
        for piece, score in joined.items()
        for cut in range(1, len(piece))
        if piece[:cut] in joined and piece[cut:] in joined
    ]
    merges.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in merges]
