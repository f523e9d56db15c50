"""One vLLM `LLM` on one core: `python _offline.py CORE SLOTS RANK BASE JOB.json`.

JOB.json holds lists of [prompt, adapter's directory, tokens], in the order in which they are given
to `LLM.generate`. Says `ready`; then for each line on standard input generates all of it once and
says how many seconds that took.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

CORE, SLOTS, RANK, BASE, JOB = sys.argv[1:]
os.sched_setaffinity(0, {int(CORE)})
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": CORE,
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = json.loads(Path(JOB).read_text())
    adapters = sorted({adapter for _, adapter, _ in job})
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    llm = LLM(
        model=BASE,
        enable_lora=True,
        max_loras=int(SLOTS),
        max_cpu_loras=max(len(adapters), int(SLOTS)),
        max_lora_rank=int(RANK),
        lora_target_modules=modules,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        distributed_executor_backend="uni",
    )
    requests = {a: LoRARequest(a, number, a) for number, a in enumerate(adapters, 1)}
    prompts = [prompt for prompt, _, _ in job]
    loras = [requests[adapter] for _, adapter, _ in job]
    params = [
        SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True) for _, _, tokens in job
    ]
    llm.generate(prompts[:32], params[:32], lora_request=loras[:32], use_tqdm=False)
    print("ready", file=answers)
    for _ in sys.stdin:
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, lora_request=loras, use_tqdm=False)
        assert len(outputs) == len(job)
        print(time.perf_counter() - began, file=answers)


if __name__ == "__main__":
    main()
