"""Requests over HTTP, many at once, streamed: when each token came, and which one it was."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import aiohttp

FIRST_ID = 3
"""Smaller ids are special ones in most vocabularies."""
TOPIC_IDS = 64
"""Distinct ids of a topic's prompts. A token's experts depend on the token most, so topics load different ones."""


@dataclass
class Workload:
    """`requests` greedy completions, `concurrency` at a time; the topic changes `topics - 1` times on the way."""

    requests: int
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    topics: int
    vocabulary: int
    seed: int = 0

    def prompts(self) -> list[list[int]]:
        """Token ids of each request, the same ones in every run."""
        numbers = random.Random(self.seed)
        topics = [numbers.sample(range(FIRST_ID, self.vocabulary), TOPIC_IDS) for _ in range(self.topics)]
        return [
            numbers.choices(topics[number * self.topics // self.requests], k=self.prompt_tokens)
            for number in range(self.requests)
        ]


@dataclass
class Answer:
    """`tokens` of a request; `times_s` when tokens came, after the request was sent: one at a time, mostly."""

    tokens: list[int]
    times_s: list[float]


async def ask_all(url: str, model: str, load: Workload) -> list[Answer]:
    """The answers, in order of their requests. Raises RuntimeError when one fails."""
    import aiohttp  # vLLM needs it, too

    prompts = load.prompts()
    answers: list[Answer | None] = [None] * len(prompts)
    waiting = iter(range(len(prompts)))
    timeout = aiohttp.ClientTimeout(total=None, sock_read=300)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def client() -> None:
            for number in waiting:
                answers[number] = await ask(session, url, model, prompts[number], load.output_tokens)

        await asyncio.gather(*(client() for _ in range(load.concurrency)))
    return [answer for answer in answers if answer is not None]


async def ask(session: aiohttp.ClientSession, url: str, model: str, prompt: list[int], num_tokens: int) -> Answer:
    """One streamed completion. Lines are read as they come and understood afterwards, which keeps the clock free."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    lines: list[tuple[float, bytes]] = []
    began = time.perf_counter()
    async with session.post(f"{url}/v1/completions", json=body) as reply:
        if reply.status != 200:
            raise RuntimeError(f"the server answered {reply.status}: {await reply.text()}")
        async for line in reply.content:
            if line.startswith(b"data:"):
                lines.append((time.perf_counter() - began, line))
    return read_answer(lines, num_tokens)


def read_answer(lines: list[tuple[float, bytes]], num_tokens: int) -> Answer:
    """Tokens, and the times of the events that brought any. Raises RuntimeError unless there are `num_tokens`."""
    answer = Answer([], [])
    for at_s, line in lines:
        data = line[len(b"data:") :].strip()
        if data == b"[DONE]":
            break
        event = json.loads(data)
        if "error" in event:
            raise RuntimeError(f"the server's answer ended with {event['error']}")
        for choice in event["choices"]:
            tokens = choice.get("token_ids") or []
            answer.tokens += tokens
            if tokens:
                answer.times_s.append(at_s)
    if len(answer.tokens) != num_tokens:
        raise RuntimeError(f"the server answered {len(answer.tokens)} tokens where {num_tokens} were asked for")
    return answer
