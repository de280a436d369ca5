"""ONNX Runtime GenAI. An adapter belongs to a generator, which is a static batch: requests are
grouped by their adapter.

    pip install onnxruntime-genai onnx onnx-ir torch transformers peft safetensors
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai
from worker import NEW, PROMPT, Answers, Requests, adapter_folder, arguments, by_adapter, measure

ADAPTERS = 16


class Server:
    def __init__(self, models: Path, model: str, form: str, threads: int, adapters: bool) -> None:
        folder = _build(models, model, form, adapters)
        file = folder / "genai_config.json"
        config = json.loads(file.read_text())
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        config["search"]["max_length"] = PROMPT + NEW
        config["search"]["past_present_share_buffer"] = True
        file.write_text(json.dumps(config, indent=1))
        self.model = genai.Model(str(folder))
        if adapters:
            self.adapters = genai.Adapters(self.model)
            for i in range(ADAPTERS):
                source = adapter_folder(models, model, i) / "adapter.onnx_adapter"
                self.adapters.load(str(source), f"a{i}")

    def serve(self, requests: Requests, new: int) -> Answers:
        answers: Answers = [[] for _ in requests]
        for group in by_adapter(requests):
            prompts = [requests[i][0] for i in group]
            for i, ids in zip(group, self._batch(prompts, requests[group[0]][1], new), strict=True):
                answers[i] = ids
        return answers

    def _batch(self, prompts: list[list[int]], adapter: int | None, new: int) -> Answers:
        how = genai.GeneratorParams(self.model)
        length = PROMPT + new
        how.set_search_options(
            max_length=length, min_length=length, batch_size=len(prompts), do_sample=False
        )
        generator = genai.Generator(self.model, how)
        if adapter is not None:
            generator.set_active_adapter(self.adapters, f"a{adapter}")
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        rows = range(len(prompts))
        return [[int(t) for t in generator.get_sequence(row)][PROMPT:] for row in rows]


def _build(models: Path, model: str, form: str, adapters: bool) -> Path:
    """The model as ONNX; with adapters, the one that the builder folds into the graph becomes
    inputs of the graph that others can be given to."""
    folder = models / f"{model}-onnx-{form}{'-lora' if adapters else ''}"
    if folder.exists():
        return folder
    extra = ["int4_accuracy_level=4"] if form == "int4" else []
    if adapters:
        extra.append(f"adapter_path={adapter_folder(models, model, 0)}")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(models / model)]
    command += ["-o", str(folder), "-p", form, "-e", "cpu"]
    command += ["--extra_options", *extra] if extra else []
    subprocess.run(command, check=True, stdout=sys.stderr)
    if adapters:
        inputs = _open_adapters(folder / "model.onnx", adapter_folder(models, model, 0))
        for i in range(ADAPTERS):
            _export_adapter(adapter_folder(models, model, i), inputs)
    return folder


def _open_adapters(file: Path, adapter: Path) -> dict[str, tuple[str, bool]]:
    """Turns the folded A and B into graph inputs, zero unless given. -> input: its PEFT key and
    whether it is a B. adapter: one with the shapes of all."""
    import onnx
    from onnx import TensorProto, helper
    from safetensors import safe_open

    model = onnx.load(str(file), load_external_data=False)
    graph = model.graph
    inputs, dropped = {}, set()
    with safe_open(adapter / "adapter_model.safetensors", "numpy") as tensors:
        for node in list(graph.node):
            if "/lora_A/" not in node.name and "/lora_B/" not in node.name:
                continue
            path = node.name.strip("/").rsplit("/", 1)[0].replace("/attn/", "/self_attn/")
            name = path.replace("/", ".") + ".weight"
            key = f"base_model.model.{name}"
            inputs[name] = (key, "lora_B" in key)
            dropped.update(node.input[1:])
            given = [node.input[0], name]
            node.CopyFrom(helper.make_node("MatMul", given, list(node.output), name=node.name))
            out_in = tensors.get_slice(key).get_shape()
            shape = tuple(reversed(out_in))
            zeros = np.zeros(shape, np.float32).tobytes()
            graph.initializer.append(
                helper.make_tensor(name, TensorProto.FLOAT, shape, zeros, raw=True)
            )
            graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    kept = [i for i in graph.initializer if i.name not in dropped]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    onnx.save(model, str(file))
    return inputs


def _export_adapter(folder: Path, inputs: dict[str, tuple[str, bool]]) -> None:
    import onnxruntime
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    scale = np.float32(config["lora_alpha"] / config["r"])
    tensors = load_file(folder / "adapter_model.safetensors")
    values: dict[str, Any] = {}
    for name, (key, second) in inputs.items():
        w = np.ascontiguousarray(tensors[key].float().numpy().T)
        values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(w * scale if second else w)
    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(1)
    made.set_parameters(values)
    made.export_adapter(str(folder / "adapter.onnx_adapter"))


def main() -> None:
    args = arguments()
    version = f"onnxruntime-genai {genai.__version__}"
    names = args.workloads.split(",")
    for adapters, some in ((False, ("W2", "W3")), (True, ("W1", "W4"))):
        chosen = [w for w in names if w in some]
        if chosen:
            server = Server(args.models, args.model, args.form, args.threads, adapters)
            measure(chosen, server.serve, version)
            del server


if __name__ == "__main__":
    main()
