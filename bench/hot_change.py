"""Answers during hot changes of the bundle, each checked against the expert that it claims.

Two bundles with the same base and router and with different experts are published in turn through
`POST /admin/bundle`, every other time by way of a canary, as fast as one change follows another,
while clients ask experts by name and by meaning. What each version of each expert answers to each
question was computed beforehand by transformers and peft, greedily; only questions are asked for
which no version is near a tie and no two answer alike. An answer is wrong when its tokens are not
those of the version in its header, when body and header name different versions, or when another
expert than the one asked for answers; it is failed when its status is not 200 or its connection
breaks. With `--slots 1` the experts of an engine take turns on one slot, and each is copied ahead
into another one.

    .venv/bin/python bench/hot_change.py [--quick] [--responses 10000] [--slots N] [--report FILE]
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from _report import Report, parser
from _served import World, made_world, served
from _stand import DIRECT

from configs.manifest import BaseEntry, BundleManifest
from deploy.output import note, say
from server.admin_key import admin_key_file

WORK = Path("runs/bench/hot_change")
CLIENTS = 16
TOKENS = 6
CLEAR = 0.002
"""Nats by which the best token must lead the next at every step of an expected answer."""
CANARY = 0.3
CANARY_S = 1.0
CHANGE_S = 120.0
PROMPTS = tuple(
    f"{form} {thing}"
    for form in ("how I learnt about", "questions and answers on", "what is there to say about")
    for thing in (
        "roasting potatoes",
        "a tomato soup",
        "sorting a list in Python",
        "a recursive function",
        "the orbit of Jupiter",
        "a lunar eclipse",
    )
)
Expected = dict[tuple[str, str], list[int]]
"""(served name, prompt) to the tokens of the greedy answer."""


@dataclass
class Watch:
    """What the clients have seen."""

    wanted: int
    changes_wanted: int
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    by_version: dict[str, int] = field(default_factory=dict)
    changes: list[float] = field(default_factory=list)
    """Seconds of each change that was done."""
    stuck: str = ""

    @property
    def responses(self) -> int:
        return self.right + len(self.wrong) + len(self.failed)

    @property
    def over(self) -> bool:
        enough = self.responses >= self.wanted and len(self.changes) >= self.changes_wanted
        return enough or bool(self.stuck)


def second_bundle(world: World) -> Path:
    """A bundle beside the world's own: same base, same router, other experts."""
    from expert_trainer.base import base_digest
    from expert_trainer.bundle import ExpertDraft, publish
    from tests.cards import make_card
    from tests.end_to_end.conftest import BASE_NAME, EXPERTS, RANK, build_expert, expert_id

    place = world.root / "bundle-b"
    if (place / "manifest.json").is_file():
        return place
    digest = base_digest(world.config(world.root / "work").base)
    drafts = []
    for cluster in range(EXPERTS):
        directory = world.root / "adapters-b" / expert_id(cluster)
        fingerprint = build_expert(world.base, directory, seed=cluster + 101)
        facts = {"rank": RANK, "alpha": 2 * RANK, "base_digest": digest}
        card = make_card(cluster, fingerprint=fingerprint, **facts)
        drafts.append(ExpertDraft(directory, card, 1 / EXPERTS))
    publish(
        place,
        base=BaseEntry(name=BASE_NAME, model=str(world.base), digest=digest),
        router_dir=world.root / "router",
        clusters=EXPERTS,
        experts=drafts,
        config_digest="0" * 64,
    )
    return place


def manifest_of(place: Path) -> BundleManifest:
    return BundleManifest.model_validate_json((place / "manifest.json").read_text())


def expected_answers(world: World, places: list[Path]) -> Expected:
    """Greedy answers of every expert of the bundles, where none is near a tie and no two are the
    same."""
    from peft import PeftModel
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(world.base)
    found: Expected = {}
    unclear = set()
    for place in places:
        for entry in manifest_of(place).experts:
            base = LlamaForCausalLM.from_pretrained(world.base)
            model = PeftModel.from_pretrained(base, str(place / entry.directory)).eval()
            for prompt in PROMPTS:
                tokens, lead = greedy(model, tokenizer(prompt).input_ids)
                found[entry.served_name, prompt] = tokens
                if lead < CLEAR:
                    unclear.add(prompt)
    for prompt in PROMPTS:
        answers = [tuple(tokens) for (_, asked), tokens in found.items() if asked == prompt]
        if len(set(answers)) < len(answers):
            unclear.add(prompt)
    return {key: tokens for key, tokens in found.items() if key[1] not in unclear}


def greedy(model: Any, ids: list[int]) -> tuple[list[int], float]:
    """The answer's tokens, and the least lead of a chosen token over the next best, nats."""
    import torch

    lead = float("inf")
    begin = len(ids)
    with torch.no_grad():
        for _ in range(TOKENS):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            best = logits.topk(2)
            lead = min(lead, float(best.values[0] - best.values[1]))
            ids = [*ids, int(best.indices[0])]
    return ids[begin:], lead


async def client(
    http: aiohttp.ClientSession, url: str, expected: Expected, watch: Watch, number: int
) -> None:
    prompts = sorted({prompt for _, prompt in expected})
    experts = sorted({name.partition("@")[0] for name, _ in expected})
    models = [*experts, "introvert"]
    turn = number
    while not watch.over:
        model, prompt = models[turn % len(models)], prompts[turn // len(models) % len(prompts)]
        turn += CLIENTS
        body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        try:
            async with http.post(f"{url}/v1/completions", json=body) as response:
                answer = await response.json(content_type=None)
                if response.status != 200:
                    watch.failed.append(f"{model}: {response.status} {json.dumps(answer)[:300]}")
                    continue
        except (aiohttp.ClientError, TimeoutError) as error:
            watch.failed.append(f"{model}: {type(error).__name__} {error}")
            continue
        said = response.headers
        claimed = f"{said['x-introvert-expert']}@{said['x-introvert-expert-version']}"
        fault = judge(model, prompt, claimed, answer, expected)
        if fault:
            watch.wrong.append(fault)
        else:
            watch.right += 1
            watch.by_version[claimed] = watch.by_version.get(claimed, 0) + 1


def judge(model: str, prompt: str, claimed: str, answer: Any, expected: Expected) -> str:
    """What is wrong with an answer; empty where nothing is."""
    expert = claimed.partition("@")[0]
    if model not in (expert, "introvert"):
        return f"{model} was asked, {claimed} answered"
    if answer["model"] != claimed:
        return f"the header says {claimed}, the body {answer['model']}"
    tokens = answer["choices"][0]["token_ids"]
    if (claimed, prompt) not in expected:
        return f"{claimed} is no version of either bundle"
    if tokens != expected[claimed, prompt]:
        others = [
            name for (name, asked), those in expected.items() if asked == prompt and those == tokens
        ]
        return f"{claimed} did not answer {prompt!r}: it was {others or 'nobody known'}"
    return ""


async def change(
    http: aiohttp.ClientSession, url: str, places: list[Path], watch: Watch, key: dict[str, str]
) -> None:
    """Publish the bundles in turn for as long as clients ask."""
    turn = 0
    while not watch.over:
        turn += 1
        canary = CANARY if turn % 2 == 0 else None
        began = time.monotonic()
        order = {"path": str(places[turn % len(places)]), "canary": canary}
        async with http.post(f"{url}/admin/bundle", json=order, headers=key) as response:
            if response.status != 202:
                watch.stuck = f"a bundle was not taken: {response.status} {await response.text()}"
                return
        state = await settle(http, url, key, began)
        if state != "done":
            watch.stuck = f"a change ended as {state}"
            return
        watch.changes.append(time.monotonic() - began)
        note(f"  change {turn}: {watch.changes[-1]:.1f} s; {watch.responses} responses")


async def settle(http: aiohttp.ClientSession, url: str, key: dict[str, str], began: float) -> str:
    """Follow a change to its end, promoting it where it waits as a canary; how it ended."""
    while time.monotonic() - began < CHANGE_S:
        await asyncio.sleep(0.2)
        async with http.get(f"{url}/admin/bundle", headers=key) as response:
            facts = await response.json()
        state = facts["change"]["state"] if facts.get("change") else "done"
        if state in ("done", "refused", "aborted"):
            return state if state == "done" else json.dumps(facts["change"])
        if state == "canary":
            await asyncio.sleep(CANARY_S)
            async with http.post(f"{url}/admin/bundle/promote", headers=key) as response:
                await response.read()
    return f"not ended after {CHANGE_S:.0f} s: {json.dumps(facts)}"


async def watching(url: str, expected: Expected, places: list[Path], watch: Watch) -> None:
    port = int(url.rpartition(":")[2])
    key = {"authorization": f"Bearer {admin_key_file(port).read_text().strip()}"}
    timeout = aiohttp.ClientTimeout(total=180)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        changing = change(http, url, places, watch, key)
        clients = [client(http, url, expected, watch, i) for i in range(CLIENTS)]
        await asyncio.gather(changing, *clients)


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--responses", type=int, help="default: 10000, with --quick 500")
    arguments.add_argument("--slots", type=int, metavar="N", help="serving.slots")
    options = arguments.parse_args()
    wanted = options.responses or (500 if options.quick else 10_000)
    report = Report("hot_change")
    here = WORK.resolve()
    world = made_world(here)
    second = second_bundle(world)
    expected = expected_answers(world, [world.bundle, second])
    # The service has a copy of the first bundle, so that nothing else refers to where it lies.
    first = world.root / "bundle-a"
    shutil.rmtree(first, ignore_errors=True)
    shutil.copytree(world.bundle, first)
    note(f"{len({p for _, p in expected})} of {len(PROMPTS)} questions have clear answers")
    watch = Watch(wanted, changes_wanted=2 if options.quick else 10)
    serving = {"slots": options.slots} if options.slots else {}
    with served(here, World(world.root, world.base, first), serving=serving) as service:
        asyncio.run(watching(service.url, expected, [first, second], watch))
        with DIRECT.open(f"{service.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
    for what, unit in (("prefetches", "adapters"), ("worker_cold_loads", "requests")):
        name = f"introvert_gateway_{what}_total"
        count = sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))
        report.add(what, count, unit)
    report.add("responses", watch.responses, "responses", f">= {wanted}")
    report.add("changes", len(watch.changes), "changes", f">= {watch.changes_wanted}")
    report.add("wrong_responses", len(watch.wrong), "responses", "== 0")
    report.add("failed_responses", len(watch.failed), "responses", "== 0")
    if watch.changes:
        typical = sorted(watch.changes)[len(watch.changes) // 2]
        report.add("change_seconds_p50", typical, "s")
    for name, count in sorted(watch.by_version.items()):
        say(f"{count:6} answers by {name}")
    for fault in [*sorted(set(watch.wrong))[:5], *sorted(set(watch.failed))[:5], watch.stuck]:
        say(fault)
    report.conditions |= {
        "clients": CLIENTS,
        "tokens": TOKENS,
        "canary": CANARY,
        "slots": options.slots or "auto",
    }
    return report.close(options.report)


if __name__ == "__main__":
    sys.exit(main())
