"""Everything that was generated in a step, as one Parquet file: a row per response."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from megatron_aspo.common.atomic import disk_errors
from megatron_aspo.data.records import Group, Sample

SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("data_source", pa.string()),
        ("index", pa.int32()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("reward", pa.float64()),
        ("shaped_reward", pa.float64()),
        ("reward_details", pa.string()),
        ("finish_reason", pa.string()),
        ("seed", pa.int64()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("rollout_logprobs", pa.list_(pa.float32())),
        ("versions", pa.list_(pa.struct([("version", pa.int64()), ("start", pa.int32()), ("stop", pa.int32())]))),
    ]
)


def write_rollouts(path: Path, groups: Sequence[Group]) -> None:
    """Write `path` whole or not at all. `reward_details` is JSON, because each reward has its own fields."""
    table = pa.Table.from_pylist([_row(sample) for group in groups for sample in group.samples], schema=SCHEMA)
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with disk_errors(path):
        parquet.write_table(table, unfinished, compression="zstd")
        unfinished.replace(path)


def _row(sample: Sample) -> dict:
    generation = sample.generation
    return {
        "prompt_id": sample.prompt.id,
        "data_source": sample.prompt.data_source,
        "index": sample.index,
        "prompt": sample.prompt.text,
        "response": sample.text,
        "reward": sample.reward,
        "shaped_reward": sample.shaped_reward,
        "reward_details": json.dumps(sample.reward_details, allow_nan=False),
        "finish_reason": generation.finish_reason,
        "seed": sample.seed,
        "prompt_ids": list(sample.prompt.token_ids),
        "response_ids": generation.token_ids.tolist(),
        "rollout_logprobs": generation.logprobs.tolist(),
        "versions": [{"version": span.version, "start": span.start, "stop": span.stop} for span in generation.versions],
    }
