"""Repair of how transformers reads a SentencePiece model that comes without tokenizer.json.

transformers 5.19 orders BPE merges by piece id; SentencePiece orders them by score. Where both disagree (Llama's and Mistral's runs of
spaces, whose score is −1e9) text is split differently from how the model was trained, with no warning. Can go when transformers
orders by score too.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_aspo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES = (
    "What is 12 + 30?  Answer with only the number.",
    "def f(x):\n    return x ** 2  # squared\n\n\n\tdone",
    "Zoë paid 1,234.50 € for naïve 日本語 and 🙂🙂",
)


def order_merges_by_score(tokenizer: "PreTrainedTokenizerBase", model_file: Path) -> None:
    """Gives `tokenizer`, which transformers made from the SentencePiece `model_file`, the merges of that model; compares both on PROBES.

    A Unigram model is only compared. Raises UserError where they still differ: training would see other tokens than the model knows.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers.models import BPE

    processor = SentencePieceProcessor(model_file=str(model_file))
    backend = tokenizer.backend_tokenizer
    if isinstance(backend.model, BPE):
        backend.model = BPE(
            vocab={processor.id_to_piece(i): i for i in range(processor.get_piece_size())},
            merges=_merges_by_score(processor),
            unk_token=processor.id_to_piece(processor.unk_id()),
            byte_fallback=any(processor.is_byte(i) for i in range(processor.get_piece_size())),
            fuse_unk=True,
        )
    for text in PROBES:
        expected, found = processor.encode(text), tokenizer(text, add_special_tokens=False)["input_ids"]
        if found != expected:
            raise UserError(
                f"{model_file}: transformers splits {text!r} into {tokenizer.convert_ids_to_tokens(found)}, SentencePiece into "
                f"{processor.encode(text, out_type=str)}; set tokenizer_class in tokenizer_config.json, or add the model's tokenizer.json"
            )


def _merges_by_score(processor) -> list[tuple[str, str]]:
    """Every pair of pieces that joins to a piece, best score of the joined piece first; pieces that text never joins to are left out."""
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
