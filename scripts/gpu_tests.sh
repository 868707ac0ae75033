#!/bin/sh
# All tests that need a GPU, in one command; exits with 1 if anything failed.
#   scripts/gpu_tests.sh [pytest arguments]
# Settings: PYTHON (python3, or .venv's), JOBS (processes of pytest-xdist, where it is installed; host time is
# measured without them), FLASHGEN_FUZZ_SECONDS (20), FLASHGEN_FUZZ_SEED, FLASHGEN_RACE_LAUNCHES (2000), MEMCHECK=off
set -u
cd "$(dirname "$0")/.." || exit 1
if [ -z "${PYTHON:-}" ]; then
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
reports=$(mktemp -d)
trap 'rm -rf "$reports"' EXIT
status=0

"$PYTHON" -c 'import torch, cupy; print("torch", torch.__version__, "| cupy", cupy.__version__, "|", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())))' || exit 1

# tests MARKERS [pytest arguments]: what waits for five minutes says where, and goes on waiting.
tests() {
  markers=$1
  shift
  "$PYTHON" -m pytest tests/gpu -m "$markers" -rs --durations=10 -o faulthandler_timeout=300 --capture=tee-sys \
    --junitxml="$reports/$markers.xml" "$@"
  code=$?
  [ $code = 0 ] || [ $code = 5 ] || status=1  # 5: the arguments leave none of these
}
tests "gpu and not alone" -q ${JOBS:+-n "$JOBS"} "$@"
tests "gpu and alone" -q "$@"

if [ "${MEMCHECK:-on}" = off ]; then
  memcheck="switched off"
else
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
  if [ -z "$sanitizer" ]; then
    memcheck="not run: compute-sanitizer is not installed (it comes with the CUDA toolkit)"
  elif "$sanitizer" --tool memcheck --error-exitcode 1 --kernel-regex kns=attn_fwd "$PYTHON" tests/gpu/memcheck.py; then
    memcheck="clean"
  else
    memcheck="FAILED"
    status=1
  fi
fi

"$PYTHON" - "$memcheck" "$reports"/*.xml <<'PY' || status=1
import sys
import xml.etree.ElementTree as xml

_, memcheck, *reports = sys.argv
suites = [suite for report in reports for suite in xml.parse(report).getroot().iter("testsuite")]
total, failed, skipped = (sum(int(suite.get(key)) for suite in suites) for key in ("tests", "failures", "skipped"))
failed += sum(int(suite.get("errors")) for suite in suites)
print(f"gpu tests: {total - failed - skipped} passed, {failed} failed, {skipped} skipped; memcheck: {memcheck}")
if total == skipped:
    sys.exit("gpu tests: nothing ran")
PY
exit $status
