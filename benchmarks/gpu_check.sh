#!/usr/bin/env bash
# Checks and measures the GPU kernels on a machine that has a GPU, in under nine minutes:
#
#     benchmarks/gpu_check.sh DIR
#
# builds, runs the tests marked `gpu`, and compares the Triton kernels with native PyTorch (cuDNN) on
# ResNet-50's layers in bfloat16, channels_last, 256 images. Everything is written to DIR as it
# comes: what is there when time runs out is whole. The summary at the end tells what failed.
#
# It has not been run on a GPU yet. What it needs: Linux, Python >= 3.10 with a CUDA build of torch
# (PYTHON=..., default python3) and triton; nothing is downloaded unless these are missing from
# PYTHON, in which case it says so and stops.
set -uo pipefail

folder=${1:?"usage: $0 DIR, the folder that gets the results"}
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
limit=${GPU_CHECK_SECONDS:-530}
started=$SECONDS
mkdir -p "$folder" || exit 2
folder=$(cd "$folder" && pwd)
summary=$folder/summary.txt
: > "$summary"
cd "$root" || exit 2
export PYTHONPATH=$root GDFAST_CACHE_DIR=$folder/cache TRITON_CACHE_DIR=$folder/triton-cache
unset TRITON_INTERPRET

left() { echo $((limit - (SECONDS - started))); }
say() { echo "[$((SECONDS - started)) s] $*" | tee -a "$summary"; }

# step NAME SECONDS COMMAND...: runs it for at most so long, with its output in DIR/NAME.log.
step() {
  local name=$1 most=$2 status
  shift 2
  if (($(left) < most)); then most=$(left); fi
  if ((most < 5)); then
    say "$name: not run, no time left"
    return 1
  fi
  timeout --signal=INT --kill-after=15 "$most" "$@" > "$folder/$name.log" 2>&1
  status=$?
  case $status in
    0) say "$name: done" ;;
    124 | 130 | 137) say "$name: stopped after $most s" ;;
    *)
      say "$name: failed with $status; the last lines:"
      tail -n 5 "$folder/$name.log" | tee -a "$summary"
      ;;
  esac
  return "$status"
}

"$python" - > "$folder/machine.json" 2> "$folder/machine.log" << 'PYTHON'
import json, sys
import torch
if not torch.cuda.is_available():
    sys.exit("torch.cuda.is_available() is False")
import triton
device = torch.cuda.get_device_properties(0)
print(json.dumps({
    "gpu": device.name, "capability": f"{device.major}.{device.minor}",
    "multiprocessors": device.multi_processor_count, "gibibytes": round(device.total_memory / 2**30, 1),
    "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
    "triton": triton.__version__, "python": sys.version.split()[0],
}, indent=2))
PYTHON
if [[ $? -ne 0 ]]; then
  say "machine: cannot be used: $(tail -n 1 "$folder/machine.log")"
  exit 2
fi
say "machine: $(tr -d '\n{}"' < "$folder/machine.json" | tr -s ' ')"

# The compiled modules, where a compiler is; the Triton kernels run without them.
step build 100 "$python" -m pip install --no-build-isolation --no-deps -e . ||
  say "build: going on without the compiled modules"
step doctor 60 "$python" -m gdfast doctor
failed=0
# On INT, when its time is over, pytest tells what failed until then.
step tests 240 "$python" -m pytest -v --tb=short -m gpu --maxfail=20 tests || failed=1
seconds=$(($(left) - 30))
step layers "$((seconds + 15))" "$python" benchmarks/gpu_layers.py "$folder/layers.json" \
  --seconds "$seconds" || failed=1
step layers-table 20 "$python" benchmarks/gpu_layers.py "$folder/layers.json" --table
[[ -s $folder/layers-table.log ]] && cat "$folder/layers-table.log" >> "$summary"
say "results in $folder"
exit $failed
