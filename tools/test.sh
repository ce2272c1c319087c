#!/usr/bin/env bash
# Sets up .venv if needed, then runs ruff, pyright and tests. Arguments go to pytest.
#   bash tools/test.sh                                  the short tier, about 10 minutes on 2 cores: most tests, and one short whole run
#   .ci/run                                             all but nightly and GPU tests, about 45 minutes; the same as -m "not gpu and not nightly"
#   bash tools/test.sh -m nightly                       the claims of .ci/run's tests on more cases
#   bash tools/test.sh -m gpu                           tests that need a CUDA device
#   bash tools/test.sh tests/unit/test_losses.py -k clip   files, or some of their tests; nightly and GPU tests only with -m
# Without files, tests/unit and tests/math run two at a time, then the others one by one, because they use both cores or limit seconds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet . || { echo "test.sh: run .venv/bin/ruff format ." >&2; exit 1; }
.venv/bin/basedpyright
pytest=(.venv/bin/python -m pytest)
for argument in "$@"; do
    if [[ $argument == tests || $argument == tests/* ]]; then exec "${pytest[@]}" -m "not gpu and not nightly" "$@"; fi
done

status=5
run() {
    local result=0
    "${pytest[@]}" -m "not gpu and not nightly and not long" "$@" || result=$?
    if ((result == 2)); then exit 2; fi # interrupted
    # 5: the arguments select no test of these folders, which is an error only if they select none at all.
    if ((result != 5 && (result != 0 || status == 5))); then status=$result; fi
}
# loadfile: the tests of a file share its fixtures.
OMP_NUM_THREADS=1 run -n 2 --dist loadfile tests/unit tests/math "$@"
run tests/code tests/parallel tests/e2e tests/gpu "$@"
exit "$status"
