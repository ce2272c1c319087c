"""A packed micro-batch on the device: what the model reads and where the loss looks."""

from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from megatron_aspo.data.batch import TrainBatch


@dataclass(frozen=True)
class MicroBatch:
    """Segments one after another. A segment is one sample without its last token, which is only ever a target; with shared prompts it is
    one prompt, then the responses to it, each without its last token.
    """

    token_ids: Tensor
    """int64 [1, tokens]"""
    position_ids: Tensor
    """int64 [1, tokens]: the place of each token in its own sample."""
    cu_seqlens: Tensor
    """int32 [segments + 1]"""
    max_seqlen: int
    branches: list[Tensor] | None
    """With shared prompts, for each segment int64 [segment tokens]: −1 in the prompt, else which response a token belongs to."""
    predictors: Tensor
    """int64 [response tokens]: index of the token whose hidden state predicts each response token."""
    targets: Tensor
    """int64 [response tokens]"""
    response_index: Tensor
    """int64 [response tokens]: where each stands in the step's response token arrays."""
    mask: Tensor
    """bool [response tokens]"""
    offsets: list[int]
    """Response i is response tokens [offsets[i], offsets[i + 1])."""
    names: tuple[str, ...]


def cut(batch: TrainBatch, samples: np.ndarray, device: torch.device, shared_prompts: bool = False) -> MicroBatch:
    """The micro-batch of these samples. With no sample: one token that nothing looks at, so that every rank runs the same schedule."""
    tokens, positions, lengths, branches, predictors, targets, index = [], [], [], [], [], [], []
    start = 0
    key = (lambda i: batch.groups[i]) if shared_prompts else (lambda i: i)
    for _, members in groupby(samples, key=key):
        segment = list(members)
        ids = batch.token_ids[batch.offsets[segment[0]] : batch.offsets[segment[0] + 1]]
        prompt = int(batch.prompt_lengths[segment[0]])
        parts, places, owners = [ids[:prompt]], [np.arange(prompt)], [np.full(prompt, -1)]
        end = start + prompt
        for branch, i in enumerate(segment):
            response = batch.token_ids[batch.offsets[i] + prompt : batch.offsets[i + 1]]
            own = len(response) - 1
            parts.append(response[:-1])
            places.append(prompt + np.arange(own))
            owners.append(np.full(own, branch))
            # The prompt's last token predicts the first response token, of every response that shares it.
            predictors.append(np.concatenate([[start + prompt - 1], end + np.arange(own)]))
            targets.append(response)
            index.append(np.arange(batch.response_offsets[i], batch.response_offsets[i + 1]))
            end += own
        tokens += parts
        positions += places
        branches.append(np.concatenate(owners))
        lengths.append(end - start)
        start = end
    if not len(samples):
        tokens, positions, lengths, branches = [np.zeros(1)], [np.zeros(1)], [1], [np.full(1, -1)]

    def put(arrays: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays or [np.zeros(0)]).astype(np.int64)).to(device)

    flat = np.concatenate(index or [np.zeros(0, np.int64)])
    counts = [len(target) for target in targets]
    return MicroBatch(
        token_ids=put(tokens)[None],
        position_ids=put(positions)[None],
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device),
        max_seqlen=max(lengths),
        branches=[put([owners]) for owners in branches] if shared_prompts else None,
        predictors=put(predictors),
        targets=put(targets),
        response_index=put([flat]),
        mask=torch.from_numpy(batch.mask[flat]).to(device),
        offsets=[0, *np.cumsum(counts).tolist()],
        names=tuple(batch.names[i] for i in samples),
    )
