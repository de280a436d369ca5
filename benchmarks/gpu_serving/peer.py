"""transformers' own continuous batching on the same weights, unpacked to 16 bits; and its word on
what the server answered."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from gpu_kernels.data import DEVICE, ON_GPU
from transformers import ContinuousBatchingConfig, GenerationConfig

from gpu_serving.checkpoint import dense_model, write
from gpu_serving.parts import Row, Stage
from gpu_serving.streams import request

NAME = "transformers, 16 bits"
TOLERANCE = {"bfloat16": 0.15, "float32": 1e-3}
"""Of a log-probability; in bfloat16 each of some fifty products of a token is rounded once."""

SMALL = {"num_blocks": 8, "max_batch_tokens": 64}
"""Of its cache in a rehearsal on a CPU, which would else be most of the machine's memory."""


def transformers(stage: Stage) -> Iterator[Row]:
    """The server's rows of this run are compared with it, so they come first."""
    folder = write(stage.folder / "base", stage.sizes.shape)
    model: Any = dense_model(folder, stage.sizes.shape)
    yield from _score(stage, model)
    sizes = stage.sizes
    for batch in sizes.batches:
        head = {"engine": NAME, "graphs": None, "batch": batch, "form": "base"}
        try:
            rate, context, ms = _decode(stage, model, batch)
        except Exception as error:
            what = f"{type(error).__name__}: {str(error)[:300]}"
            yield {"what": "decode", **head, "absent": what}
            continue
        attention = getattr(model.config, "_attn_implementation", "?")
        more = {"context": context, "p50_ms": round(ms, 4), "attention": attention}
        more["transformers"] = version("transformers")
        yield stage.row("decode", round(rate, 1), "tokens/s", **{**head, **more})
        for past in stage.past:
            about = (past["what"], past.get("engine"), past.get("form"), past.get("batch"))
            if about == ("decode", "deltaserve", "base", batch):
                times = past["value"] / rate
                ratio = stage.row("decode, to transformers", round(times, 3), "x", batch=batch)
                yield {**ratio, "graphs": past["graphs"]}


def _score(stage: Stage, model: Any) -> Iterator[Row]:
    """What transformers gives the tokens that the server chose."""
    prompt = list(request(stage.sizes, 0, "", 1).prompt_ids)
    most = TOLERANCE[stage.sizes.shape.dtype]
    for past in [row for row in stage.past if row["what"] == "answer"]:
        ids = torch.tensor([prompt + past["ids"]], device=DEVICE)
        with torch.inference_mode():
            logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
        given = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        off = float((given.cpu() - torch.tensor(past["logprobs"])).abs().max())
        row = stage.row(
            "log-probabilities, from transformers'", round(off, 6), "nats", goal=f"< {most}",
            met=off < most,
        )  # fmt: skip
        yield {**row, "graphs": past["graphs"]}


def _decode(stage: Stage, model: Any, batch: int) -> tuple[float, int, float]:
    """Tokens a second from when all sequences have `warm` tokens until the first ends, tokens of
    context halfway, and the median of the milliseconds between two tokens of one."""
    sizes = stage.sizes
    tokens = sizes.warm + sizes.steps
    prompts = [list(request(sizes, i, "", 1).prompt_ids) for i in range(batch)]
    config = GenerationConfig(
        max_new_tokens=tokens + batch * sizes.prompt // sizes.max_batch_tokens,
        do_sample=False, eos_token_id=-1, pad_token_id=0,
    )  # fmt: skip
    done = model.generate_batch(
        prompts,
        generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(**({} if ON_GPU else SMALL)),
        record_timestamps=True,
    )
    if len(done) != batch or any(one.error for one in done.values()):
        errors = {str(one.error) for one in done.values() if one.error}
        raise RuntimeError(f"{len(done)} of {batch} answered; {'; '.join(sorted(errors))}")
    times = [one.timestamps for one in done.values()]
    begin, end = max(t[sizes.warm - 1] for t in times), min(t[-1] for t in times)
    if end <= begin:
        raise RuntimeError("the sequences were not all decoding at once")
    within = [[t for t in one if begin <= t <= end] for one in times]
    gaps = sorted(b - a for one in within for a, b in itertools.pairwise(one))
    made = sum(t > begin for one in within for t in one)
    before = sum(t <= begin for one in times for t in one) + made / 2
    rate = made / (end - begin)
    return rate, round(sizes.prompt + before / batch), 1e3 * gaps[len(gaps) // 2]
