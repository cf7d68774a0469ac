#!/usr/bin/env bash
# Checks and measures the GPU kernels on a machine that has a GPU, in one call of under nine minutes:
#
#     benchmarks/gpu_check.sh DIR [--dry-run]
#
# builds gdfast._cuda, runs the tests that need a GPU, puts every CUDA kernel under compute-sanitizer,
# measures both GPU backends against native PyTorch (gpu_layers.py) and profiles the slowest layers.
# DIR gets eight files as results come, the first to read being summary.txt; what is there when time
# runs out is whole. The exit status is 1 where anything failed, 2 where nothing could be done.
#
# It needs Linux, nvcc, a CUDA build of torch, triton, pybind11, CMake >= 3.24, Ninja or make, and
# pytest (PYTHON=..., default python3); nothing is downloaded. GPU_CHECK_SECONDS (default 525) bounds
# the whole; what comes before measuring takes at most 350. GPU_CHECK_ROWS (a part of their name)
# measures those rows alone and leaves out tests, sanitizers and profile: for what a first call had
# no time for. GPU_CHECK_COMMIT names the commit where the tree came without its repository.
# GPU_CHECK_NATIVE is a folder with gdfast's modules as built elsewhere from this tree, for this
# Python and GPU; nothing is compiled by nvcc then. With --dry-run nothing is built and no GPU is
# needed: native PyTorch stands for our kernels, on tiny cases on the CPU.
set -uo pipefail

folder=${1:?"usage: $0 DIR [--dry-run]: the folder that gets the results"}
dry=$([[ ${2:-} == --dry-run ]] && echo yes)
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
limit=${GPU_CHECK_SECONDS:-525}
started=$SECONDS
mkdir -p "$folder" || exit 2
folder=$(cd "$folder" && pwd)
cd "$root" || exit 2
scratch=$root/build/gpu-check
summary=$folder/summary.txt
for name in summary.txt build.log tests.log sanitizer.log profile.txt; do : > "$folder/$name"; done
rm -f "$folder"/results.*
export PYTHONPATH=$root PYTHONUNBUFFERED=1
# Without it, cuBLAS refuses deterministic algorithms, which some tests ask for.
export CUBLAS_WORKSPACE_CONFIG=:4096:8
failed=0
unset TRITON_INTERPRET GDFAST_CUDA_SIMULATE GDFAST_BACKEND GDFAST_AUTOTUNE GDFAST_HOPPER
if [[ -z ${GPU_CHECK_COMMIT:-} ]] && GPU_CHECK_COMMIT=$(git rev-parse HEAD 2> /dev/null); then
  git diff --quiet HEAD || GPU_CHECK_COMMIT+=-changed
fi
export GPU_CHECK_COMMIT

left() { echo $((limit - (SECONDS - started))); }
say() { echo "[$((SECONDS - started)) s] $*" | tee -a "$summary"; }

# step NAME LOG SECONDS COMMAND...: runs it for at most so long, its output added to DIR/LOG.
step() {
  local name=$1 log=$folder/$2 most=$3 status
  shift 3
  if (($(left) < most)); then most=$(left); fi
  if ((most < 5)); then
    say "$name: not run, no time left"
    return 1
  fi
  # INT first: pytest and others then tell what they know. Whole lines, since several may write.
  timeout --signal=INT --kill-after=10 "$most" "$@" 2>&1 | sed -u "s/^/$name: /" >> "$log"
  status=${PIPESTATUS[0]}
  case $status in
    0) say "$name: done; $(tail -n 400 "$log" | grep "^$name: " | tail -n 1 | cut -c 1-200)" ;;
    124 | 130 | 137) say "$name: stopped after $most s" ;;
    *)
      say "$name: failed with $status; the last lines:"
      grep "^$name: " "$log" | tail -n 6 | cut -c 1-300 | tee -a "$summary"
      ;;
  esac
  return "$status"
}

measure() { # SECONDS [OPTION]: rows of gpu_layers.py, and their table for the summary
  step measure tests.log "$(($1 + 20))" "$python" benchmarks/gpu_layers.py "$folder" \
    --seconds "$1" --only "${GPU_CHECK_ROWS:-}" ${2:+"$2"} || failed=1
  [[ -s $folder/results.txt ]] && sed -n '/^| what | against/,/^$/p' "$folder/results.txt" >> "$summary"
}

profile() { # SECONDS
  [[ -s $folder/results.json ]] || return
  local most=$(($1 < 100 ? $1 : 100))
  step profile profile.txt "$most" "$python" benchmarks/gpu_profile.py "$folder" \
    --seconds "$((most - 10))" || failed=1
}

say "commit ${GPU_CHECK_COMMIT:-unknown}"
if [[ $dry ]]; then
  say "dry run: native PyTorch in the place of our kernels, on the CPU; times mean nothing"
  step kernels sanitizer.log 120 "$python" benchmarks/gpu_kernels.py --backend reference \
    -k "${GPU_CHECK_ROWS:-}" || failed=1
  measure "$(($(left) - 100))" --dry-run
  profile "$(($(left) - 20))"
  say "results in $folder"
  exit $failed
fi

# --- The machine ------------------------------------------------------------------------------

if ! architecture=$("$python" - 2>> "$folder/build.log" << 'PYTHON'
import sys
import torch
if not torch.cuda.is_available():
    sys.exit("torch.cuda.is_available() is False")
device = torch.cuda.get_device_properties(0)
print(f"gpu {device.name}, torch {torch.__version__}", file=sys.stderr)
# Hopper's own instructions need the a.
print(f"{device.major}.{device.minor}" + "a" * (device.major == 9))
PYTHON
); then
  say "machine: cannot be used: $(tail -n 1 "$folder/build.log")"
  exit 2
fi
say "machine: $(tail -n 1 "$folder/build.log"), compute capability $architecture"

# What compilers and the choice of tiles remember stays out of DIR.
mkdir -p "$scratch"
export GDFAST_CACHE_DIR=$scratch/cache TRITON_CACHE_DIR=$scratch/triton
export TORCHINDUCTOR_CACHE_DIR=$scratch/inductor
for home in "${CUDA_HOME:-}" "${CUDA_PATH:-}" /usr/local/cuda; do
  [[ -n $home && -d $home/bin ]] && export PATH=$PATH:$home/bin
done
# CMake and Ninja may be Python's packages.
PATH=$PATH:$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')

# --- Build, while Triton's and torch.compile's kernels are compiled too ------------------------

build() {
  local generator=() ninja
  rm -rf "$scratch/native"
  if ninja=$(command -v ninja); then generator=(-G Ninja "-DCMAKE_MAKE_PROGRAM=$ninja"); fi
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$architecture} cmake -S . -B "$scratch/native" \
    "${generator[@]}" -DGDFAST_CUDA=ON -DGDFAST_BASELINE_ONLY=ON \
    "-DCMAKE_CUDA_COMPILER=${CUDACXX:-$(command -v nvcc || echo nvcc)}" \
    -DCMAKE_CUDA_FLAGS=-lineinfo "-DPython_EXECUTABLE=$(command -v "$python")" \
    "-Dpybind11_DIR=$("$python" -m pybind11 --cmakedir)" &&
    cmake --build "$scratch/native" --parallel "$(nproc)"
}
export -f build
export scratch python architecture

# launch COMMAND...: in the background, in a process group of its own; there, bash would otherwise
# have INT ignored.
launch() {
  set -m
  "$@" &
  set +m
}

# Nothing of these may take a module that is half written: there is none for them.
export GDFAST_NATIVE_DIR=$scratch/none
warming=()
for part in 0 1 2 3; do
  launch env GDFAST_CACHE_DIR="$scratch/warm-cache" \
    "$python" benchmarks/gpu_layers.py "$folder" --warm "$part/4" > /dev/null 2>&1
  warming+=($!)
done
pytest=("$python" -m pytest -q --tb=short -p no:cacheprovider)
jobs_running=()
if [[ -z ${GPU_CHECK_ROWS:-} ]]; then
  # Each test compiles kernels of its own: they share the processors in as many processes.
  parts=(
    layers="test_layers_of_resnet50"
    float32="test_odd_cases and float32"
    bfloat16="test_odd_cases and bfloat16"
    float16="test_odd_cases and float16 and not bfloat16"
    resnet50="test_models and resnet50"
    models="test_models and not resnet50"
  )
  printf -v parted ' or (%s)' "${parts[@]#*=}"
  for part in "${parts[@]}" "others=not (${parted# or })"; do
    launch step "triton-${part%%=*}" tests.log 165 "${pytest[@]}" --maxfail=30 -k "${part#*=}" \
      tests/test_triton_gpu.py
    jobs_running+=($!)
  done
  launch step triton-memory tests.log 165 "${pytest[@]}" --maxfail=30 \
    tests/test_triton_gpu_memory.py
  jobs_running+=($!)
fi

native=$scratch/native
if [[ ${GPU_CHECK_NATIVE:-} ]]; then
  native=$(cd "$GPU_CHECK_NATIVE" && pwd)
  say "build: none, the modules are those of GPU_CHECK_NATIVE"
else
  step build build.log 170 bash -c build || failed=1
fi
if compgen -G "$native/_cuda*.so" > /dev/null; then
  export GDFAST_NATIVE_DIR=$native
  built=yes
else
  # Of the tree's own modules, if any, nobody knows what they were built from.
  say "build: no CUDA kernels; going on with Triton's alone"
  built=
  failed=1
fi

# --- Tests and sanitizers, side by side: none of them is timed ---------------------------------

launch step doctor build.log 100 "$python" -m gdfast doctor
doctor=$!
# A kernel for Hopper that waits for what never comes ends its process's use of the GPU: it stays a
# candidate of the tuner where it has been right, in a process of its own.
if [[ $built ]]; then
  if step hopper tests.log 60 "${pytest[@]}" --maxfail=3 tests/test_cuda_hopper.py; then
    say "hopper: its kernels are candidates, where the GPU is one"
    if ! step hopper_grad_weight tests.log 60 "${pytest[@]}" --maxfail=3 \
      tests/test_cuda_hopper_grad_weight.py; then
      export GDFAST_HOPPER=no_grad_weight
      say "hopper: that of the gradient in the weight is left out from here on"
      failed=1
    fi
  else
    export GDFAST_HOPPER=0
    say "hopper: its kernels are left out from here on"
    failed=1
  fi
fi
if [[ $built && -z ${GPU_CHECK_ROWS:-} ]]; then
  # A process for each file: what costs one its GPU costs the others nothing.
  for file in $(grep -lE 'mark\.(gpu|cuda_simulator)' tests/test_*.py |
    grep -vE 'test_triton|test_cuda_hopper(_grad_weight)?\.py|gpu_check'); do
    name=${file##*/test_}
    launch step "${name%.py}" tests.log 110 "${pytest[@]}" --maxfail=30 -m gpu "$file"
    jobs_running+=($!)
  done
  if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
      # Without torch's allocator, whose large blocks would hide a step beyond a tensor's end.
      launch step "$tool" sanitizer.log 110 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 30 \
        "$python" benchmarks/gpu_kernels.py
      jobs_running+=($!)
    done
  else
    say "sanitizer: no compute-sanitizer in PATH; the kernels run without"
    launch step kernels sanitizer.log 100 "$python" benchmarks/gpu_kernels.py
    jobs_running+=($!)
  fi
fi
for job in "${jobs_running[@]}"; do wait "$job" || failed=1; done
wait "$doctor"  # what it tells is in build.log; tests have the last word
# What is not yet compiled will be when its turn comes.
for job in "${warming[@]}"; do kill -KILL -- "-$job"; done 2> /dev/null
wait 2> /dev/null

# --- Measurements, with nothing beside them ----------------------------------------------------

if [[ ${GPU_CHECK_ROWS:-} ]]; then
  measure "$(($(left) - 10))"
else
  measure "$(($(left) - 65))"
  profile "$(($(left) - 5))"
fi
say "results in $folder"
exit $failed
