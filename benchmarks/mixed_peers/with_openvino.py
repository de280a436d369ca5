"""OpenVINO GenAI's continuous batching. Requests of one `generate` share their adapter: when they
name different ones, all are answered with the first one's.

    pip install openvino-genai optimum-intel nncf torch peft && pip uninstall torchvision
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from worker import PROMPT, Answers, Requests, adapter_folder, arguments, by_adapter, measure

EXPORT = {
    "fp16": [],
    "int8": [],
    "int4": ["--group-size", "128", "--ratio", "1.0", "--sym"],
}
SCALE = 2.0  # alpha 32 / rank 16: GenAI takes it from here, not from PEFT's config


class Server:
    """adapters: how many are registered; the base's pipeline has none."""

    def __init__(self, models: Path, model: str, form: str, threads: int, adapters: int) -> None:
        folder = _export(models, model, form)
        options: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        self.adapters = [
            genai.Adapter(str(adapter_folder(models, model, i) / "adapter_model.safetensors"))
            for i in range(adapters)
        ]
        if adapters:
            config = genai.AdapterConfig()
            for adapter in self.adapters:
                config.add(adapter, SCALE)
            options["adapters"] = config
        scheduling = genai.SchedulerConfig()
        scheduling.max_num_batched_tokens, scheduling.max_num_seqs = 2048, 16
        scheduling.cache_size, scheduling.enable_prefix_caching = 2, False
        scheduling.dynamic_split_fuse = True
        self.pipeline = genai.ContinuousBatchingPipeline(
            str(folder), genai.Tokenizer(str(folder)), scheduling, "CPU", **options
        )

    def serve(self, requests: Requests, new: int) -> Answers:
        answers: Answers = [[] for _ in requests]
        for group in by_adapter(requests):
            prompts = [ov.Tensor(np.array([requests[i][0]], dtype=np.int64)) for i in group]
            configs = [self._config(requests[i][1], new) for i in group]
            for i, result in zip(group, self.pipeline.generate(prompts, configs), strict=True):
                ids = list(result.m_generation_ids[0])
                answers[i] = ids[PROMPT:] if len(ids) > new else ids
        return answers

    def _config(self, adapter: int | None, new: int) -> Any:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new
        config.ignore_eos, config.do_sample = True, False
        if adapter is not None:
            config.adapters = genai.AdapterConfig(self.adapters[adapter], SCALE)
        return config


def _export(models: Path, model: str, form: str) -> Path:
    folder = models / f"{model}-openvino-{form}"
    if not folder.exists():
        tool = Path(sys.executable).parent / "optimum-cli"
        command = [str(tool), "export", "openvino", "-m", str(models / model)]
        command += ["--task", "text-generation-with-past", "--weight-format", form]
        subprocess.run([*command, *EXPORT[form], str(folder)], check=True, stdout=sys.stderr)
    return folder


def main() -> None:
    args = arguments()
    version = f"openvino-genai {genai.__version__}"
    names = args.workloads.split(",")
    for adapters, some in ((0, ("W2", "W3")), (16, ("W1", "W4"))):
        chosen = [w for w in names if w in some]
        if chosen:
            server = Server(args.models, args.model, args.form, args.threads, adapters)
            measure(chosen, server.serve, version)
            del server


if __name__ == "__main__":
    main()
