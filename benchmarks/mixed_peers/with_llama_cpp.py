"""llama.cpp through llama-cpp-python's C API: one context of 16 sequences, a batch of all that
share their adapter, as llama-server batches them (`can_batch_with` in its server-context.cpp).

    pip install llama-cpp-python gguf numpy psutil safetensors torch   # CMAKE_ARGS=-DGGML_NATIVE=ON
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import gguf_files
import llama_cpp as lib
import numpy as np
from worker import PROMPT, Answers, Requests, adapter_folder, arguments, by_adapter, measure

FORMS = {"Q4_0": 2, "Q8_0": 7, "BF16": 32}
SEQUENCES, LENGTH, BATCH = 16, 256, 2048


class Server:
    def __init__(self, models: Path, model: str, form: str, threads: int) -> None:
        self.models, self.name = models, model
        file = _files(models, model, form, threads)
        self.model = lib.llama_model_load_from_file(
            os.fsencode(file), lib.llama_model_default_params()
        )
        assert self.model, f"{file} was refused"
        vocabulary = lib.llama_model_get_vocab(self.model)
        self.vocabulary = lib.llama_vocab_n_tokens(vocabulary)
        how = lib.llama_context_default_params()
        how.n_ctx, how.n_seq_max, how.n_batch = SEQUENCES * LENGTH, SEQUENCES, BATCH
        how.n_threads = how.n_threads_batch = threads
        how.kv_unified, how.no_perf = False, True
        self.context = lib.llama_init_from_model(self.model, how)
        self.batch = lib.llama_batch_init(BATCH, 0, 1)
        self.adapters: dict[int, Any] = {}

    def serve(self, requests: Requests, new: int) -> Answers:
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        answers: Answers = [[] for _ in requests]
        for group in by_adapter(requests):
            self._use(requests[group[0]][1])
            room = BATCH // PROMPT
            for some in (group[i : i + room] for i in range(0, len(group), room)):
                prompts = [(i, k, t) for i in some for k, t in enumerate(requests[i][0])]
                for i, token in zip(some, self._decode(prompts, PROMPT - 1), strict=True):
                    answers[i].append(token)
            for at in range(PROMPT, PROMPT + new - 1):
                step = [(i, at, answers[i][-1]) for i in group]
                for i, token in zip(group, self._decode(step, at), strict=True):
                    answers[i].append(token)
        return answers

    def _use(self, adapter: int | None) -> None:
        if adapter is None:
            assert lib.llama_set_adapters_lora(self.context, None, 0, None) == 0
            return
        if adapter not in self.adapters:
            folder = adapter_folder(self.models, self.name, adapter)
            file = folder / "adapter.gguf"
            if not file.exists():
                gguf_files.write_adapter(folder, self.models / self.name, file)
            made = lib.llama_adapter_lora_init(self.model, os.fsencode(file))
            assert made, f"{file} was refused"
            self.adapters[adapter] = made
        one = (lib.llama_adapter_lora_p_ctypes * 1)(self.adapters[adapter])
        scale = (ctypes.c_float * 1)(1.0)
        assert lib.llama_set_adapters_lora(self.context, one, 1, scale) == 0

    def _decode(self, items: list[tuple[int, int, int]], wanted: int) -> list[int]:
        """items: (sequence, position, token). -> the best next token behind position `wanted`."""
        rows = []
        self.batch.n_tokens = len(items)
        for row, (sequence, position, token) in enumerate(items):
            self.batch.token[row], self.batch.pos[row] = token, position
            self.batch.n_seq_id[row], self.batch.seq_id[row][0] = 1, sequence
            self.batch.logits[row] = position == wanted
            if position == wanted:
                rows.append(row)
        assert lib.llama_decode(self.context, self.batch) == 0
        found = (lib.llama_get_logits_ith(self.context, row) for row in rows)
        return [int(np.ctypeslib.as_array(p, (self.vocabulary,)).argmax()) for p in found]


def _files(models: Path, model: str, form: str, threads: int) -> Path:
    plain, file = models / f"{model}-f16.gguf", models / f"{model}-{form}.gguf"
    if not plain.exists():
        gguf_files.write_model(models / model, plain)
    if not file.exists():
        how = lib.llama_model_quantize_default_params()
        how.nthread, how.ftype = threads, FORMS[form]
        done = lib.llama_model_quantize(os.fsencode(plain), os.fsencode(file), ctypes.byref(how))
        assert done == 0
    return file


def main() -> None:
    args = arguments()
    silent = lib.llama_log_callback(lambda *line: None)
    lib.llama_log_set(silent, None)
    lib.llama_backend_init()
    server = Server(args.models, args.model, args.form, args.threads)
    version = f"llama-cpp-python {lib.__version__}"
    measure(args.workloads.split(","), server.serve, version)


if __name__ == "__main__":
    main()
