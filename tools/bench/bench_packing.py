"""Measure fill, balance and time of packing: .venv/bin/python tools/bench/bench_packing.py [--draws 5] [--budget 8192]

`pack` against plain greedy packing: longest first to the lightest rank; within a rank, longest first to the lightest of the number of
micro-batches that first fit needs for the fullest rank, or first fit's own where that keeps the budget and this does not.

Lengths. 8 to 512 samples over 2 to 64 ranks, at least two per rank, none longer than the budget: log-normal with a cap (median 1,500,
σ = 0.8), bimodal (700 and 6,000), all equal, and few long ones (3 % at the cap, the rest about 400). Budgets: the cap, and twice the cap.

Shared prompts. Groups of 16 log-normal responses to one prompt of 80 to 600 tokens, over as many ranks as groups or twice as many.

Work. Log-normal lengths up to 32,768 (median 8,000), models of several hidden sizes: tokens and attention of the fullest rank, in
floating-point operations, when tokens are balanced and when work is. A layer has 12 · hidden² parameters.

Each value is the mean over draws and budgets: micro-batches per rank; fill; imbalance; lockstep, the imbalance if ranks waited for each
other at every micro-batch; over bound, the fullest rank's tokens over a lower bound of every packing: the longest sample, or a rank's mean
when every prompt is read once; and milliseconds per call. The last line is one JSON object.
"""

import argparse
import json
import time
from collections.abc import Callable

import numpy as np

from megatron_aspo.data.batch import TrainBatch
from megatron_aspo.data.packing import PackingMetrics, measure, pack

SAMPLES, RANKS = (8, 32, 128, 512), (2, 4, 8, 16, 32, 64)
Shares = list[list[np.ndarray]]


def log_normal(random: np.random.Generator, samples: int, cap: int, median: float = 1500) -> np.ndarray:
    return np.clip(random.lognormal(np.log(median), 0.8, samples), 1, cap).astype(np.int64)


def bimodal(random: np.random.Generator, samples: int, cap: int) -> np.ndarray:
    lengths = np.where(random.random(samples) < 0.7, random.normal(700, 150, samples), random.normal(6000, 800, samples))
    return np.clip(lengths, 50, cap).astype(np.int64)


def equal(random: np.random.Generator, samples: int, cap: int) -> np.ndarray:
    return np.full(samples, min(1000, cap))


def few_long(random: np.random.Generator, samples: int, cap: int) -> np.ndarray:
    return np.where(random.random(samples) < 0.03, cap, np.clip(random.normal(400, 100, samples), 50, cap)).astype(np.int64)


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "log_normal": log_normal,
    "bimodal": bimodal,
    "equal": equal,
    "few_long": few_long,
}


def batch_of(responses: np.ndarray, prompts: np.ndarray) -> TrainBatch:
    """Return a batch where only lengths matter: `responses` after `prompts`, tokens [samples] and [groups]; a group shares its prompt."""
    groups = np.arange(len(prompts)).repeat(len(responses) // len(prompts))
    return TrainBatch(
        token_ids=np.zeros(0, np.int64),
        offsets=np.concatenate([[0], np.cumsum(prompts[groups] + responses)]),
        response_offsets=np.concatenate([[0], np.cumsum(responses)]),
        mask=np.zeros(0, bool),
        rollout_logprobs=np.zeros(0, np.float32),
        rewards=np.zeros(len(responses)),
        groups=groups,
        names=("",) * len(responses),
    )


def plain(lengths: np.ndarray) -> TrainBatch:
    """Return samples of these lengths in tokens read, each in its own group."""
    return batch_of(lengths, np.ones_like(lengths))


def greedy(batch: TrainBatch, ranks: int, token_budget: int, shared_prompts: bool) -> Shares:
    """Pack all samples greedily; with shared prompts, the unit is as many samples of one group as the budget takes."""
    units: list[list[int]] = []
    lengths: list[int] = []
    prompts, reads = batch.prompt_lengths.tolist(), batch.lengths.tolist()
    for i in range(batch.samples):
        more = reads[i] - prompts[i]
        if shared_prompts and units and batch.groups[units[-1][0]] == batch.groups[i] and lengths[-1] + more <= token_budget:
            units[-1].append(i)
            lengths[-1] += more
        else:
            units.append([i])
            lengths.append(reads[i])
    order = sorted(range(len(units)), key=lambda unit: -lengths[unit])
    by_rank = to_the_lightest(order, lengths, ranks)
    count = max(1, *(len(first_fit(share, lengths, token_budget)) for share in by_rank))
    shares = []
    for share in by_rank:
        bins = to_the_lightest(share, lengths, count)
        if max(sum(lengths[unit] for unit in members) for members in bins) > token_budget:
            bins = first_fit(share, lengths, token_budget)
            bins += [[] for _ in range(count - len(bins))]
        shares.append([np.array(sorted(i for unit in members for i in units[unit]), np.int64) for members in bins])
    return shares


def to_the_lightest(order: list[int], lengths: list[int], bins: int) -> list[list[int]]:
    totals, members = [0] * bins, [[] for _ in range(bins)]
    for unit in order:
        lightest = totals.index(min(totals))
        members[lightest].append(unit)
        totals[lightest] += lengths[unit]
    return members


def first_fit(order: list[int], lengths: list[int], token_budget: int) -> list[list[int]]:
    totals, members = [], []
    for unit in order:
        fits = next((i for i, total in enumerate(totals) if total + lengths[unit] <= token_budget), len(totals))
        if fits == len(totals):
            totals.append(0)
            members.append([])
        members[fits].append(unit)
        totals[fits] += lengths[unit]
    return members


class Means:
    """Means of the metrics of several packings, by name."""

    NAMES = ("micro_batches", "fill", "imbalance", "lockstep", "over_bound", "ms")

    def __init__(self):
        self.rows: list[tuple[float, ...]] = []

    def add(self, figures: PackingMetrics, shares: Shares, bound: float, seconds: float) -> None:
        balance = figures.imbalance, figures.lockstep_imbalance, figures.fullest / bound
        self.rows.append((len(shares[0]), figures.fill, *balance, 1000 * seconds))

    def figures(self) -> dict[str, float]:
        return dict(zip(self.NAMES, np.mean(self.rows, axis=0).tolist(), strict=True))


def compare(batches: list[TrainBatch], ranks: int, budgets: list[int], shared: bool, all_of: dict[str, Means]) -> str:
    """Return one line of the table; every packing is added to the totals in `all_of`."""
    here = {"greedy": Means(), "pack": Means()}
    for batch in batches:
        every = np.arange(batch.samples)
        bound = max(batch.lengths.max(), measure(batch, [[every]], 1, shared).tokens / ranks)
        for budget in budgets:
            for name in here:
                start = time.perf_counter()
                shares = greedy(batch, ranks, budget, shared) if name == "greedy" else pack(batch, every, ranks, budget, shared)
                seconds = time.perf_counter() - start
                figures = measure(batch, shares, budget, shared)
                here[name].add(figures, shares, bound, seconds)
                all_of[name].add(figures, shares, bound, seconds)
    return " | ".join(line_of(here[name].figures()) for name in here)


def line_of(figures: dict[str, float]) -> str:
    return "{micro_batches:7.2f} {fill:6.3f} {imbalance:8.4f} {lockstep:8.4f} {over_bound:10.4f} {ms:8.2f}".format(**figures)


def measure_work(random: np.random.Generator, hidden: int, samples: int, ranks: int, draws: int) -> tuple[float, float]:
    """Return the imbalance of work when tokens are balanced and when work is; means over draws."""
    pair_cost = 1 / (6 * hidden)
    found = []
    for _ in range(draws):
        batch = plain(log_normal(random, samples, 32768, median=8000))
        every = np.arange(samples)
        shares = [pack(batch, every, ranks, 32768, False, pair_cost=cost) for cost in (0.0, pair_cost)]
        found.append([measure(batch, share, 32768, False, pair_cost).imbalance for share in shares])
    return tuple(np.mean(found, axis=0).tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description="Fill, balance and time of packing, against plain greedy packing.")
    parser.add_argument("--draws", type=int, default=5, help="batches of each kind (default 5)")
    parser.add_argument("--budget", type=int, default=8192, help="tokens of the smaller budget, and of the longest sample (default 8192)")
    parsed = parser.parse_args()
    random = np.random.default_rng(0)
    budgets = [parsed.budget, 2 * parsed.budget]
    summary: dict[str, float] = {}

    head = "micro-b   fill   imbal. lockstep over bound       ms"
    print(f"{'':26} {'greedy':<{len(head)}} | pack\n{'':12} samples ranks {head} | {head}")
    for name, draw in DISTRIBUTIONS.items():
        all_of = {"greedy": Means(), "pack": Means()}
        for samples in SAMPLES:
            for ranks in (ranks for ranks in RANKS if 2 * ranks <= samples):
                batches = [plain(draw(random, samples, parsed.budget)) for _ in range(parsed.draws)]
                print(f"{name:12} {samples:7} {ranks:5} {compare(batches, ranks, budgets, False, all_of)}", flush=True)
        summary |= {f"{name}_{packing}_{key}": value for packing, means in all_of.items() for key, value in means.figures().items()}
    all_of = {"greedy": Means(), "pack": Means()}
    for groups in (8, 32):
        for ranks in (groups // 4, groups, 2 * groups):
            prompts = [random.integers(80, 600, groups) for _ in range(parsed.draws)]
            batches = [batch_of(log_normal(random, 16 * groups, parsed.budget - 600), lengths) for lengths in prompts]
            print(f"{'shared':12} {16 * groups:7} {ranks:5} {compare(batches, ranks, budgets, True, all_of)}", flush=True)
    summary |= {f"shared_{packing}_{key}": value for packing, means in all_of.items() for key, value in means.figures().items()}
    for hidden in (1536, 4096):
        for samples, ranks in ((64, 8), (512, 16), (512, 64)):
            tokens, work = measure_work(random, hidden, samples, ranks, parsed.draws)
            balanced = f"{tokens:.4f} when tokens are balanced, {work:.4f} when work is"
            print(f"hidden {hidden}, {samples} samples, {ranks} ranks: the fullest rank's work over the mean is {balanced}", flush=True)
            summary |= {f"work_{hidden}_{samples}_{ranks}_by_tokens": tokens, f"work_{hidden}_{samples}_{ranks}_by_work": work}
    print(json.dumps({key: round(value, 4) for key, value in summary.items()}))


if __name__ == "__main__":
    main()
