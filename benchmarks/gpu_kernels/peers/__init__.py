"""Other projects' kernels, timed beside ours in the same run.

They are carried, never committed: `benchmarks/carried/` (or `--peers DIR`) is expected to hold

| folder | from | what of it | imports there |
|---|---|---|---|
| `vllm/lora/ops/triton_ops/` | vllm-project/vllm, `vllm/lora/ops/triton_ops`, 0.33.0 | `kernel_utils`, `lora_shrink_op`, `lora_expand_op`, `lora_kernel_metadata`, `utils` | `vllm.envs`, `.logger`, `.platforms`, `.triton_utils`, `.utils` are stood in for |
| `sglang/kernels/ops/lora/dense/` | sgl-project/sglang, `python/sglang/kernels/ops/lora/dense`, 0.5.23 | all of it, with `csgmv_configs/` | `sglang.srt.*` is stood in for |
| `bitdelta/` | FasterDecoding/BitDelta, `bitdelta`, commit ecbee1e | `binary_gemm_kernel.py` | nothing |
| `gemlite/` | dropbox/gemlite, 0.6.0.post2 (the sdist on PyPI) | the package, of `configs/` only `h100.json` | asks for the device's name when imported |

What torch itself brings (cuBLAS, tinygemm, cuSPARSE) needs no folder. A peer that is not there, or
that does not run, is reported as absent with the reason. What is stood in for is host code that
the kernels' launchers import (settings, logging, a kernel cache); no kernel and no choice of tile
sizes is changed.
"""
