"""What vLLM's bench reads of a server, as JSON: vllm_client.py completions|chat MODEL TOKENS."""

import asyncio
import json
import os
import sys
from dataclasses import asdict

import aiohttp
from vllm.benchmarks.lib.endpoint_request_func import ASYNC_REQUEST_FUNCS, RequestFuncInput

what, model, tokens = sys.argv[1:]
kinds = {"completions": ("openai", "completions"), "chat": ("openai-chat", "chat/completions")}
backend, path = kinds[what]


async def read() -> list[dict[str, object]]:
    url = f"{os.environ['BASE_URL']}/{path}"
    async with aiohttp.ClientSession() as session:
        asked = [
            RequestFuncInput(
                prompt=prompt,
                api_url=url,
                prompt_len=len(prompt),
                output_len=int(tokens),
                model=model,
                ignore_eos=True,
                extra_body={"temperature": 0.0, "seed": 7},
            )
            for prompt in json.loads(os.environ["PROMPTS"])
        ]
        calls = (ASYNC_REQUEST_FUNCS[backend](each, session=session) for each in asked)
        return [asdict(each) for each in await asyncio.gather(*calls)]


print(json.dumps(asyncio.run(read())))
