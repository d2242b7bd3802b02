#!/usr/bin/env bash
# Runs the numeric tests as other machines would compute them: with 1, 2 and 4 threads, and without the newer
# instructions of this one. Prints a table; exits with 1 if a test failed anywhere. Arguments go to pytest.
# Each instruction set meets two thread counts and each thread count two sets: a full product would add only time.
# On a CPU without AVX-512 the last two rows repeat AVX2.
set -euo pipefail
. "$(dirname "$0")/install.sh" test
export PATH="$PWD/.venv/bin:$PATH"

# What computes: elementwise operations and norms (ATen), convolutions and all bf16 (oneDNN), matrix products (MKL).
# bf16 in oneDNN without AVX-512 takes up to a hundred times as long, so no test of this list may do much of it.
sse="ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE"
avx2="ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2"
avx512="ONEDNN_MAX_CPU_ISA=AVX512_CORE"
settings=(
  "OMP_NUM_THREADS=1 $sse"
  "OMP_NUM_THREADS=4 $sse"
  "OMP_NUM_THREADS=1 $avx2"
  "OMP_NUM_THREADS=2 $avx2"
  "OMP_NUM_THREADS=2 $avx512"
  "OMP_NUM_THREADS=4 $avx512"
)
# Of the rest of tests/unit nothing depends on how floats are added up; training in bf16 would take hours without AVX-512.
tests=(
  tests/parity
  tests/unit/test_{ops,vae,sampler,rope,properties,pipeline,text,tiny_packs,tiny_world,reference}.py
)
# Interpreted by NumPy, in one thread whatever is set; only what they are held against is computed by PyTorch.
kernels=(tests/kernels --ignore=tests/kernels/test_compile.py)

cores="$(nproc)"
logs="$(mktemp -d)"
trap 'rm -rf "$logs"' EXIT
table="" failed=0
for setting in "${settings[@]}"; do
  threads="${setting#OMP_NUM_THREADS=}" threads="${threads%% *}"
  processes=$((cores / threads > 1 ? cores / threads : 1))
  run=("${tests[@]}")
  [ "$threads" != 1 ] || run+=("${kernels[@]}")
  echo "== $setting, $processes processes"
  status=0
  # The policy: waiting threads must not hold a core where there are more of them than cores.
  env $setting OMP_WAIT_POLICY=passive \
    python -m pytest -q -n "$processes" -p no:cacheprovider "${run[@]}" "$@" > "$logs/out" 2>&1 || status=$?
  if [ "$status" = 0 ]; then
    result="$(tail -n 1 "$logs/out" | tr -d '=')"
  else
    failed=1
    cat "$logs/out"
    result="$(grep -E ' (passed|failed|errors?) in ' "$logs/out" | tail -n 1 | tr -d '=' || echo "exit $status")"
  fi
  table+="$(printf '%-105s %s' "$setting" "$result")"$'\n'
done
printf '\n%s' "$table"
exit "$failed"
