"""Other projects' kernels, timed beside ours in the same run.

They are carried, never committed: `benchmarks/carried/` (or `--peers DIR`) is expected to hold

- `vllm/lora/ops/triton_ops/`: `kernel_utils`, `lora_shrink_op`, `lora_expand_op`,
  `lora_kernel_metadata` and `utils` of vllm-project/vllm 0.33.0 (in its sdist). `vllm.envs`,
  `vllm.logger`, `vllm.platforms`, `vllm.triton_utils` and `vllm.utils` are stood in for.
- `sglang/kernels/ops/lora/dense/`: all of `sglang/kernels/ops/lora/dense` of sgl-project/sglang
  0.5.23 (in its wheel), with `csgmv_configs/`; for the backend "triton_v2" also
  `sglang/kernels/ops/lora/common`, `sglang/srt/lora/dense` with its `configs/`, and
  `sglang/srt/lora/workspace.py`. The rest of `sglang.srt` is stood in for; so are msgspec and
  pydantic where they are not installed.
- `bitdelta/binary_gemm_kernel.py`: `bitdelta/` of FasterDecoding/BitDelta, commit ecbee1e. It
  imports nothing of its own.
- `gemlite/`: the package of dropbox/gemlite 0.6.0.post2 (in its sdist), of `configs/` only
  `h100.json`. It asks for the device's name while it is imported, so it needs one.

What torch itself brings (cuBLAS, tinygemm, cuSPARSE) needs no folder. A peer that is not there, or
that does not run, is reported as absent with the reason. What is stood in for is host code that
the kernels' launchers import (settings, logging, a kernel cache); no kernel and no choice of tile
sizes is changed.
"""
