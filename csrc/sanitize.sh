#!/usr/bin/env bash
# Builds the extension with GCC's sanitizers in a scratch copy of the project and runs the C++ tests on it.
#
# Address and undefined behaviour: test_cpp.py in tests/ops/linear and tests/ops/multi, but for what is slow or compiles.
# Threads: the tests with concurrent callers, one OpenMP thread each, because the sanitizer does not see how OpenMP orders
# its own threads. Python and torch themselves are not instrumented: leaks are not looked for, and races are reported only
# where csrc/ takes part.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r csrc rlrr_kernels tests setup.py pyproject.toml "$copy"
cd "$copy"

build() {
  rm -rf build rlrr_kernels/_cpp*.so
  RLRR_BUILD_CPP=1 RLRR_CPP_FLAGS="$1 -g1 -fno-omit-frame-pointer -O1" "$PYTHON" setup.py --quiet build_ext --inplace
}

run() {
  PYTHONPATH=$PWD PYTHONMALLOC=malloc "$@"
}

echo "== AddressSanitizer and UndefinedBehaviorSanitizer"
build "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-sanitize=vptr"
run env LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so) $(gcc -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 UBSAN_OPTIONS=print_stacktrace=1 \
  "$PYTHON" -m pytest tests/ops/linear/test_cpp.py tests/ops/multi/test_cpp.py -q -s -p no:cacheprovider -m "not slow" -k "not compile"

echo "== ThreadSanitizer"
build "-fsanitize=thread"
cat > "$copy/suppressions" <<'SUPPRESSIONS'
called_from_lib:libtorch_cpu.so
called_from_lib:libtorch_python.so
called_from_lib:libgomp.so
SUPPRESSIONS
run env LD_PRELOAD="$(gcc -print-file-name=libtsan.so)" OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 \
  TSAN_OPTIONS="ignore_noninstrumented_modules=1:suppressions=$copy/suppressions:halt_on_error=0:exitcode=66" \
  setarch -R "$PYTHON" -m pytest tests/ops/linear/test_cpp.py tests/ops/multi/test_cpp.py -q -s -p no:cacheprovider -k "concurrent"
echo "== no findings"
