#!/usr/bin/env bash
# What every scheme costs the lab target in quality, and what it does to acceptance: perplexity, KL and tau of
# every method under every scheme, rounded to nearest, by GPTQ, by AWQ, rotated or not.
#   scripts/price_of_schemes.sh quantize|quality|run|report      results/price, checkpoints/price
# PROCESSES (2) cells run at once, one thread each. AWQ needs the extra `quantize`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
processes=${PROCESSES:-2}
out=checkpoints/price
common="campaign=price threads=1 dtype=float32"
nearest="dense w8a8 w8a8_smooth w4a16 w4a16_asym w4a16_channel w4a8_qqq w4a8_qqq_g128 w4a8_qoq w4a8_qoq_g128 fp8"
four_bit="w4a16 w4a16_channel w4a8_qqq w4a8_qqq_g128 w4a8_qoq w4a8_qoq_g128"

# One line a command, run side by side.
together() { xargs -P "$processes" -I{} bash -c "OMP_NUM_THREADS=1 $python -m {} >> $out/log.txt 2>&1 || echo 'failed: {}'"; }

quantize() {
  for scheme in $four_bit; do
    for quantizer in gptq gptq_rotated; do
      echo "bench.quantize quality=null threads=1 quant=$scheme quantizer=$quantizer out=$out/$scheme-$quantizer"
    done
  done
  echo "bench.quantize quality=null threads=1 quant=w4a16 quantizer=gptq_order out=$out/w4a16-gptq_order"
  for scheme in w4a8_qqq w4a8_qoq; do
    echo "bench.quantize quality=null threads=1 quant=$scheme quantizer=nearest_rotated out=$out/$scheme-nearest_rotated"
  done
  test -d $out/awq || echo "bench.quantize quality=null threads=1 quant=w4a16_asym quantizer=awq out=$out/awq"
}

targets() {
  for scheme in $nearest; do echo "quant=$scheme"; done
  for folder in "$out"/*/; do echo "quant=checkpoint model.target=${folder%/}"; done
}

mkdir -p "$out"
case ${1:?quantize, quality, run or report} in
  quantize) quantize | together ;;
  quality) targets | sed "s|.*|bench.quality $common & quality.reference=models/lab/target|" | together ;;
  run)
    methods="method=chain,eagle2,eagle3,hierarchical"
    targets | sed "s|.*|bench.run -m $common task.max_new_tokens=64 $methods &|" | together ;;
  report) $python -m bench.report campaign=price ;;
esac
