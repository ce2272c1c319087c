"""A reward for mathematics with one short answer: 1 if the last \\boxed{…} of the response is the ground truth, else 0.

Equal means the same text without blanks, dollar signs and thousands separators, or the same number: `1,024`, `1024` and `1024.0` are one,
`1/2` and `0.5` too. It knows no algebra, which `data.reward=math` does: it is an example of a custom reward. Use it as
data.reward=examples.rewards.boxed_answer:score, and try it on responses of a file first:

    megatron-aspo grade responses.jsonl --reward examples.rewards.boxed_answer:score
"""

import re
from fractions import Fraction

_NUMBER = re.compile(r"[-+]?\d{1,40}(\.\d{1,40})?(/\d{1,40})?")
"""Bounded: a response must not cost the time of a number with a billion digits."""


def score(prompt: str, response: str, ground_truth, extra: dict) -> dict:
    answer = last_boxed(response)
    if answer is None:
        return {"score": 0.0, "reason": "no \\boxed{…}"}
    right = normalized(answer) == normalized(str(ground_truth))
    return {"score": float(right), "reason": "equal" if right else "different", "answer": answer[:200]}


def last_boxed(text: str) -> str | None:
    """Return what is between the braces of the last \\boxed{…}, nested braces included; None where there is none that closes."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None


def normalized(answer: str) -> str | Fraction:
    text = re.sub(r"[\s$]|\\[,;! ]", "", answer)
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    if not _NUMBER.fullmatch(plain):
        return text
    above, _, below = plain.partition("/")
    if not below:
        return Fraction(above)
    return Fraction(above) / int(below) if int(below) else text
