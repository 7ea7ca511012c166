#!/usr/bin/env bash
# Checks a wheel on a machine that has jax, a Hopper GPU and no network:
#
#   tools/gpu_check.sh dist/jax_flashmla-*.whl [results-directory]
#
# Installs the wheel beside the machine's own packages, runs the tests with --require-gpu, then the
# benchmarks, and prints their tables last. The JSON goes to the results directory. Exits non-zero
# if anything failed.
set -uo pipefail

wheel=${1:?usage: tools/gpu_check.sh WHEEL [RESULTS_DIRECTORY]}
results=$(mkdir -p "${2:-gpu_results}" && cd "${2:-gpu_results}" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" "$wheel" || exit 1

# Copies, so that the package under test is the wheel's and not the checkout's.
cp -r "$root/tests" "$root/benchmarks" "$root/examples" "$root/LICENSE" "$root/pyproject.toml" "$work"
if commit=$(git -C "$root" rev-parse --short=12 HEAD 2>/dev/null); then
  export JAX_FLASHMLA_COMMIT=$commit
fi
export PYTHONPATH="$work/site" PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
cd "$work" || exit 1

python3 -c 'import jax_flashmla; jax_flashmla.show_config()' || exit 1
failed=0
parallel=$(python3 -c 'import xdist' 2>/dev/null && echo "-n 8")
python3 -m pytest --require-gpu -q $parallel 2>&1 | tee "$results/tests.log" | tail -30 || failed=1
python3 examples/decode_loop.py 2>&1 | tee "$results/demo.log" || failed=1
for benchmark in xla_decode planner decode; do
  python3 -m "benchmarks.$benchmark" --out "$results" 2>&1 | tee "$results/$benchmark.log" || failed=1
done
[ "$failed" = 0 ] && echo "gpu_check: all passed" || echo "gpu_check: FAILED, see above"
exit "$failed"
