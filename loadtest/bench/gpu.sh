#!/usr/bin/env bash
# What a GPU does, in at most eight minutes: the `gpu` tests, then decoding at 16k x 64 beside
# Transformers with SDPA on the same card. At the end it says what failed, and exits with 1 if
# anything did.
#
#   bash loadtest/bench/gpu.sh [FOLDER]               results go to FOLDER; default: gpu
#   DRY_RUN=1 bash loadtest/bench/gpu.sh [FOLDER]     the same on the CPU, tiny, in some seconds
#
# It needs a Python (PYTHON, default python) with the extras gpu and train, transformers and pytest:
#
#   pip install ./protos '.[gpu,train]' 'transformers>=5.23' pytest pytest-asyncio pytest-xdist
#
# Each part has its own time limit and goes on after another has failed. FOLDER has a log of each,
# bench.json with every window, and summary.txt, the end of what is printed here.

set -uo pipefail

python=${PYTHON:-python}
out=$(realpath -m "${1:-gpu}")
cd "$(dirname "$0")/../.." || exit
export PYTHONPATH=$PWD:$PWD/protos${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
rm -rf "$out"
mkdir -p "$out"
failed=()

# part NAME SECONDS COMMAND...: runs it with a limit; what it prints is shown and kept.
part() {
    local name=$1 limit=$2 code
    shift 2
    [[ -n ${DRY_RUN:-} ]] && limit=$((limit * 4)) # other programs may use the CPU
    echo "== $name (at most $limit s)"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$out/$name.log"
    code=${PIPESTATUS[0]}
    [[ $code == 124 || $code == 137 ]] && failed+=("$name: not done after $limit s")
    [[ $code != 0 && $code != 124 && $code != 137 ]] && failed+=("$name: exit code $code, see $out/$name.log")
    return 0
}

if [[ -n ${DRY_RUN:-} ]]; then
    device=cpu cells=(--dry-run --open-limit 400 --only fixed-cache-float16,transformers,transformers-bfloat16)
else
    device=cuda cells=(--cells 16kx64 --rounds 5 --open-limit 100)
    part card 15 nvidia-smi --query-gpu=name,driver_version,memory.total,memory.free --format=csv
    free=$(nvidia-smi --query-gpu=memory.free --format=csv,noheader,nounits 2>>"$out/card.log" | head -1)
    [[ $free =~ ^[0-9]+$ ]] && cells+=(--memory "$((free * 9 / 10000 + 1))")
fi

part versions 45 "$python" - "$device" <<'EOF'
import importlib, sys
from importlib.metadata import version

missing = []
for name in ("torch", "onnxruntime", "transformers", "pytest"):
    try:
        module = importlib.import_module(name)
        print(name, getattr(module, "__version__", None) or version(name))
    except ImportError as error:
        missing.append(f"{name}: {error}")
if sys.argv[1] == "cuda" and not missing:
    import onnxruntime
    import torch

    if not torch.cuda.is_available():
        missing.append("torch sees no GPU: install the torch of CUDA")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        missing.append("onnxruntime has no CUDAExecutionProvider: install onnxruntime-gpu")
sys.exit("\n".join(missing) or 0)
EOF

# -n 0: processes would share the card. A test that is skipped says why, and is no failure of its
# own: what it lacks is among the versions above.
part tests 140 "$python" -m pytest -m gpu -n 0 -q -rs -p no:cacheprovider \
    tests/server/runtime/test_device_state.py

part bench 225 "$python" -m concertina.cli.main bench --device "$device" --no-first-token \
    "${cells[@]}" --json "$out/bench.json"

# What a contestant could not do is no exit code of the bench: it is in its report.
part contestants 30 "$python" - "$out/bench.json" <<'EOF'
import json, sys

try:
    report = json.load(open(sys.argv[1]))
except (OSError, ValueError) as error:
    sys.exit(f"there is no report of the bench: {error}")
for result in report["results"]:
    cell = result["cell"]
    rounds = [each for group in result["groups"] for each in group["rounds"]]
    for entry in result["entries"]:
        steps = sorted(s for each in rounds for s in each.get(entry["name"], ()))
        if entry["outcome"] == "ok" and steps:
            step = steps[len(steps) // 2]
            print(
                f"{entry['name']}: {1 / step:,.1f} tokens/s a stream, "
                f"{cell['streams'] / step:,.0f} of all, {step * 1e3:.3g} ms a step"
            )
for each in report["ratios"]:
    if each["name"].endswith("_best"):
        low, median, high = (each["spread"][key] for key in ("low", "median", "high"))
        print(f"{each['over']} / {each['under']}: {median:.3g} ({low:.3g} to {high:.3g})")
print(*report["doubts"], sep="\n")
sys.exit("\n".join(report["absent"]) or 0)
EOF

{
    echo "== on ${device}: $SECONDS s"
    cat "$out/contestants.log"
    tail -1 "$out/tests.log"
    if ((${#failed[@]})); then printf 'FAILED %s\n' "${failed[@]}"; else echo "nothing failed"; fi
} | tee "$out/summary.txt"
((${#failed[@]} == 0))
