"""One expert the usual way: a process that loads the base, wraps it in PEFT, runs Trainer, saves.

What `bench/training.py` measures against. It imports nothing of ours, and gets its rows ready
packed and tokenized, so nothing that it could be slow at is left to it but the training itself.

    python bench/_usual_way.py BASE ROWS.npz OUT --rank 8 --alpha 16 --learning-rate 5e-3 --batch 2
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--alpha", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--warmup-share", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, required=True)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

    torch.set_num_threads(options.threads)
    set_seed(options.seed)
    rows = np.load(options.rows)
    data = [
        {name: torch.from_numpy(rows[name][index]) for name in rows.files}
        for index in range(len(rows["input_ids"]))
    ]
    model = AutoModelForCausalLM.from_pretrained(options.base, attn_implementation="sdpa")
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    steps = len(data) // options.batch
    trainer = Trainer(
        model=adapted,
        train_dataset=data,
        args=TrainingArguments(
            output_dir=str(options.out / "trainer"),
            per_device_train_batch_size=options.batch,
            max_steps=steps,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=round(options.warmup_share * steps),
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            train_sampling_strategy="sequential",
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            logging_steps=50,
            disable_tqdm=True,
            dataloader_num_workers=0,
            seed=options.seed,
        ),
    )
    begin = time.perf_counter()
    trainer.train()
    print(f"trained in {time.perf_counter() - begin:.2f} s")
    adapted.save_pretrained(options.out)


if __name__ == "__main__":
    main()
