"""What it costs that an adapter lies in host memory and not in one of the engine's slots.

A random Llama of the shape of TinyLlama 1.1B with adapters of rank 16 on all its matrices, four
for each slot, asked in turn for one token each: first an adapter that is in no slot, then the same
once more, then another whose slot was filled ahead of the request, as the gateway has it done for
experts that wait. The first difference is what filling ahead saves a request; the filling by itself
is timed, too.

    .venv/bin/python bench/cold_slot.py [--quick] [--report FILE]
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from _report import Report, parser

WORK = Path("runs/bench/cold_slot")
RANK = 16
SLOTS = 2
ADAPTERS = 4 * SLOTS
LAYERS, WIDTH, INNER, KEYS = 22, 2048, 5632, 256
MATRICES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, KEYS),
    "self_attn.v_proj": (WIDTH, KEYS),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (WIDTH, INNER),
    "mlp.up_proj": (WIDTH, INNER),
    "mlp.down_proj": (INNER, WIDTH),
}
PROMPT = [5] * 16


def make_base(directory: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)


def make_adapter(directory: Path, base: Path, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name, (fed, gives) in MATRICES.items():
            place = f"base_model.model.model.layers.{layer}.{name}"
            for half, shape in (("lora_A", (RANK, fed)), ("lora_B", (gives, RANK))):
                tensors[f"{place}.{half}.weight"] = 0.01 * torch.randn(shape, dtype=torch.bfloat16)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": sorted(name.partition(".")[2] for name in MATRICES),
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))


def milliseconds(call: Any, *arguments: Any, **named: Any) -> float:
    began = time.perf_counter()
    call(*arguments, **named)
    return (time.perf_counter() - began) * 1000


def main() -> int:
    options = parser(__doc__ or "").parse_args()
    report = Report("cold_slot")
    here = WORK.resolve()
    here.mkdir(parents=True, exist_ok=True)
    base = here / "base"
    if not (base / "config.json").exists():
        make_base(base)
    adapters = [here / f"adapter-{number}" for number in range(ADAPTERS)]
    for number, adapter in enumerate(adapters):
        if not adapter.exists():
            make_adapter(adapter, base, number)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's loop is this very thread
    logging.disable(logging.INFO)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(
        str(base),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enable_lora=True,
        max_loras=SLOTS,
        max_cpu_loras=ADAPTERS,
        max_lora_rank=RANK,
        max_model_len=256,
        max_num_seqs=8,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.5,  # on a CPU: of the memory
    )
    one_token = SamplingParams(max_tokens=1, detokenize=False)
    requests = [LoRARequest(a.name, i, str(a)) for i, a in enumerate(adapters, 1)]

    def ask(request: LoRARequest) -> float:
        prompt = {"prompt_token_ids": PROMPT}
        named = {"lora_request": request, "use_tqdm": False}
        return milliseconds(engine.generate, [prompt], one_token, **named)

    for request in requests:
        ask(request)  # from the disk to host memory
    cold, warm, ahead, filling = [], [], [], []
    for _ in range(2 if options.quick else 10):
        for request in requests:
            cold.append(ask(request))
            warm.append(ask(request))
        for request in requests:
            engine.llm_engine.add_lora(request)
            ahead.append(ask(request))
        filling += [milliseconds(engine.llm_engine.add_lora, request) for request in requests]
    size = (adapters[0] / "adapter_model.safetensors").stat().st_size
    report.add("adapter_mib", size / 2**20, "MiB")
    report.add("first_token_in_a_slot_ms", statistics.median(warm), "ms")
    report.add("first_token_in_no_slot_ms", statistics.median(cold), "ms")
    report.add("first_token_filled_ahead_ms", statistics.median(ahead), "ms")
    differences = [late - early for late, early in zip(cold, warm, strict=True)]
    report.add("difference_ms", statistics.median(differences), "ms")
    report.add("filling_a_slot_ms", statistics.median(filling), "ms")
    report.conditions |= {"slots": SLOTS, "adapters": ADAPTERS, "rank": RANK, "prompt": len(PROMPT)}
    return report.close(options.report)


if __name__ == "__main__":
    sys.exit(main())
