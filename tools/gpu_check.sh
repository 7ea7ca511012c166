#!/usr/bin/env bash
# Checks a wheel on a machine that has jax, a Hopper GPU and no network:
#
#   tools/gpu_check.sh dist/jax_flashmla-*.whl [results-directory [stage...]]
#
# Installs the wheel beside the machine's own packages and runs the stages, by default all: the tests
# with --require-gpu, small decodes under compute-sanitizer, the demo, the benchmarks, whose tables
# come last. JSON and logs go to the results directory. Exits non-zero if anything failed.
set -uo pipefail

wheel=${1:?usage: tools/gpu_check.sh WHEEL [RESULTS_DIRECTORY [STAGE...]]}
results=$(mkdir -p "${2:-gpu_results}" && cd "${2:-gpu_results}" && pwd)
stages=("${@:3}")
[ ${#stages[@]} = 0 ] && stages=(tests sanitize demo xla_decode planner step layouts fp8 decode)
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" "$wheel" || exit 1

# Copies, so that the package under test is the wheel's and not the checkout's.
for name in tests benchmarks examples tools cuda CMakeLists.txt LICENSE Makefile README.md pyproject.toml; do
  cp -r "$root/$name" "$work"
done
# Set it where the files have travelled without their history.
: "${JAX_FLASHMLA_COMMIT:=$(git -C "$root" rev-parse --short=12 HEAD 2>/dev/null)}"
export JAX_FLASHMLA_COMMIT
export PYTHONPATH="$work/site" PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
cd "$work" || exit 1

run_tests() {
  local parallel
  parallel=$(python3 -c 'import xdist' 2>/dev/null && echo "-n ${TEST_PROCESSES:-8}")
  # The references are compiled for hundreds of shapes: not worth tuning. Without that, XLA fails on
  # products that it would have Triton compile (jaxlib 0.11.2: "No supported config found").
  XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false ${XLA_FLAGS:-}" \
    python3 -m pytest --require-gpu -q $parallel 2>&1 | tee "$results/tests.log" | tail -30
}

# Each tool must find nothing, and say so: that it ran at all is part of the check.
run_sanitizers() {
  local tool status=0
  for tool in memcheck racecheck synccheck initcheck; do
    JAX_PLATFORMS=cpu compute-sanitizer --tool "$tool" --error-exitcode 1 \
      python3 tools/sanitize.py > "$results/$tool.log" 2>&1 || status=1
    echo "$tool: $(grep -E 'SUMMARY' "$results/$tool.log" || echo 'no summary')"
    grep -q -E 'SUMMARY: 0 (errors|hazards)' "$results/$tool.log" || status=1
  done
  return "$status"
}

python3 -c 'import jax_flashmla; jax_flashmla.show_config()' || exit 1
failed=0
for stage in "${stages[@]}"; do
  echo "== $stage"
  case $stage in
    tests) run_tests || failed=1 ;;
    sanitize) run_sanitizers || failed=1 ;;
    demo) python3 examples/decode_loop.py 2>&1 | tee "$results/demo.log" || failed=1 ;;
    *) python3 -m "benchmarks.$stage" --out "$results" 2>&1 | tee "$results/$stage.log" || failed=1 ;;
  esac
done
[ "$failed" = 0 ] && echo "gpu_check: all passed" || echo "gpu_check: FAILED, see above"
exit "$failed"
