"""How an evaluation answers and grades its parts: order, seeds, times of writing, and the state after a failure."""

from concurrent.futures import Future

import pytest

from megatron_aspo.common.errors import UserError
from megatron_aspo.data.records import Prompt
from megatron_aspo.evaluation.live import evaluate_live, report_failures
from megatron_aspo.evaluation.parts import PartStore
from megatron_aspo.evaluation.sampling import Evaluator, Reply, Sampling, parts_of
from megatron_aspo.rewards.result import RewardResult

PROMPTS = [Prompt(f"eval/{n}", (n, 7), f"question {n}", n, "sums") for n in range(5)]
SAMPLING = Sampling(samples=3, temperature=0.8, top_p=0.9, max_tokens=16, seed=4)


class Stub:
    """A responder and rewards in one. A response names its request's seed; replies come in the order that `order` makes of positions."""

    name = "data.reward=m:f"

    def __init__(self, order=list, failures=(), dies_after=None, suffix="", scored_at_once=True):
        self.order, self.failures, self.dies_after, self.suffix = order, failures, dies_after, suffix
        self.scored_at_once, self.calls, self.events, self.futures = scored_at_once, [], [], []

    def respond(self, requests, samples, on_reply):
        self.calls.append(requests)
        for position in self.order(range(len(requests))):
            if sum(event.startswith("reply") for event in self.events) == self.dies_after:
                raise RuntimeError("engine 1 died")
            request = requests[position]
            self.events.append(f"reply {request.id}")
            on_reply(position, Reply(f"seed {request.seed}{self.suffix}", [request.seed % 100, 2], 2, "length"))

    def submit(self, prompt, response):
        self.events.append(f"score {response}")
        future = Future()
        self.futures.append(future)
        if self.scored_at_once:
            failure = "timeout" if len(self.futures) - 1 in self.failures else ""
            future.set_result(RewardResult(prompt.ground_truth / 4, "told", {"answer": response, "verdict": "half"}, failure))
        return future

    def take_losses(self):
        return ["a worker was lost"]


def evaluate(stub, part_problems=2, one_by_one=False, rewards=True, prompts=PROMPTS, sampling=SAMPLING, parts=None):
    """Return the responses of each part, every time that it was reported."""
    reported = []

    def note(part):
        reported.append((part.number, list(part.responses)))

    evaluator = Evaluator(prompts, sampling, stub, stub if rewards else None, note)
    evaluator.run(parts or parts_of(len(prompts), part_problems), one_by_one)
    return reported


def graded(reported):
    return [response for _, responses in sorted(reported, key=lambda entry: entry[0]) if responses[0].graded for response in responses]


def test_responses_are_in_the_order_of_problems_and_samples_however_they_arrive():
    expected = graded(evaluate(Stub()))
    assert [(r.position, r.index, r.problem) for r in expected] == [(p, i, f"eval/{p}") for p in range(5) for i in range(3)]
    assert [r.score for r in expected] == [p / 4 for p in range(5) for _ in range(3)]
    assert all(r.response == f"seed {r.seed}" == r.answer and r.response_ids == [r.seed % 100, 2] for r in expected)
    for order in (reversed, lambda positions: sorted(positions, key=lambda n: (n % 4, n))):
        assert graded(evaluate(Stub(order))) == expected


def test_parts_change_only_how_many_requests_are_sent_together():
    together, apart = Stub(), Stub()
    assert graded(evaluate(together)) == graded(evaluate(apart, one_by_one=True)) == graded(evaluate(Stub(), part_problems=1))
    assert [len(call) for call in together.calls] == [15] and [len(call) for call in apart.calls] == [6, 6, 3]
    assert [request for call in apart.calls for request in call] == together.calls[0]


def test_a_part_is_reported_when_it_is_generated_and_again_when_it_is_graded():
    reported = evaluate(Stub(), one_by_one=True)
    assert [(number, responses[0].graded) for number, responses in reported] == [(n, g) for n in range(3) for g in (False, True)]
    ungraded = [response for _, part in reported[::2] for response in part]
    assert [(r.seed, r.response, r.response_ids) for r in ungraded] == [(r.seed, r.response, r.response_ids) for r in graded(reported)]


def test_each_response_is_sent_to_the_reward_immediately():
    stub = Stub()
    evaluate(stub)
    assert [event.split()[0] for event in stub.events] == ["reply", "score"] * 15


def test_seeds_depend_on_problem_sample_and_seed_alone():
    seeds = [r.seed for r in graded(evaluate(Stub()))]
    assert len(set(seeds)) == 15
    fewer = Sampling(2, 0.1, 1.0, 9, 4)
    assert [r.seed for r in graded(evaluate(Stub(), sampling=fewer))] == [seed for n, seed in enumerate(seeds) if n % 3 < 2]
    assert not set(seeds) & {r.seed for r in graded(evaluate(Stub(), sampling=Sampling(3, 0.8, 0.9, 16, 5)))}


def test_requests_carry_the_sampling():
    stub = Stub()
    evaluate(stub)
    request = stub.calls[0][4]
    assert (request.prompt_ids, request.max_tokens, request.temperature, request.top_p) == ((1, 7), 16, 0.8, 0.9)
    assert request.id == "evaluation, prompt 1 (eval/1), response 1"


def test_a_response_ends_before_the_first_stop_string():
    sampling = Sampling(1, 0.8, 0.9, 16, 4, ("###", "\nclass"))
    (first, *_) = graded(evaluate(Stub(suffix="\nclass A ### b"), sampling=sampling))
    assert first.response == f"seed {first.seed}" and first.finish_reason == "stop" and first.tokens == 2
    (first, *_) = graded(evaluate(Stub(suffix=" b"), sampling=sampling))
    assert first.response == f"seed {first.seed} b" and first.finish_reason == "length"


def test_generating_then_grading_from_disk_equals_streaming(tmp_path):
    expected = graded(evaluate(Stub()))
    store = PartStore(tmp_path, 5, 2)
    Evaluator(PROMPTS, SAMPLING, Stub(reversed), None, store.write).run(store.missing(), one_by_one=False)
    assert not store.missing() and [len(part.responses) for part in store.ungraded()] == [6, 6, 3]
    for part in PartStore(tmp_path, 5, 2).ungraded():
        Evaluator(PROMPTS, SAMPLING, None, Stub(), store.write).run([part], one_by_one=True)
    assert not list(store.ungraded()) and [r for part in store.responses() for r in part] == expected


@pytest.mark.parametrize("dies_after", [0, 5, 6, 8, 14])
def test_complete_parts_survive_a_dead_engine_and_the_rest_is_generated_identically(tmp_path, dies_after):
    store, expected = PartStore(tmp_path, 5, 2), graded(evaluate(Stub()))
    with pytest.raises(RuntimeError, match="engine 1 died"):
        Evaluator(PROMPTS, SAMPLING, Stub(dies_after=dies_after), Stub(), store.write).run(store.missing(), one_by_one=True)
    assert [part.number for part in store.missing()] == list(range(dies_after // 6, 3))
    again = Stub()
    for part in store.ungraded():
        Evaluator(PROMPTS, SAMPLING, None, again, store.write).run([part], one_by_one=True)
    Evaluator(PROMPTS, SAMPLING, again, again, store.write).run(store.missing(), one_by_one=True)
    assert sum(len(call) for call in again.calls) == 15 - 6 * (dies_after // 6)
    assert [r for part in store.responses() for r in part] == expected


def test_scores_that_have_not_begun_are_cancelled_when_an_engine_dies():
    stub = Stub(dies_after=4, scored_at_once=False)
    with pytest.raises(RuntimeError):
        evaluate(stub)
    assert len(stub.futures) == 4 and all(future.cancelled() for future in stub.futures)


def test_a_killed_writer_leaves_the_part_missing(tmp_path):
    (tmp_path / ".part_00001.parquet.77.unfinished").write_bytes(b"PAR1half")
    assert [part.number for part in PartStore(tmp_path, 5, 2).missing()] == [0, 1, 2]


def test_an_evaluation_during_training_reports_lost_workers_and_failures():
    lines, phases = [], []
    stub = Stub(failures=(1, 2, 3, 4, 9))
    responses = evaluate_live(PROMPTS, SAMPLING, stub, stub, False, phases.append, lines.append)
    assert [(r.position, r.index) for r in responses] == [(p, i) for p in range(5) for i in range(3)]
    assert phases == ["generating", "scoring"]
    assert lines[0] == "a worker was lost"
    assert lines[1] == "prompt eval/0, response 1: data.reward=m:f told; its reward is 0 (data.reward_failure_score)"
    assert lines[4:] == ["data.reward=m:f failed on 5 of 15 responses; their reward is 0"]


def test_a_reward_that_fails_on_every_response_is_an_error():
    with pytest.raises(UserError, match=r"data\.reward=m:f failed on all of 15 responses: on the last it told; correct it, or raise"):
        report_failures(graded(evaluate(Stub(failures=range(15)))), "data.reward=m:f", print)
