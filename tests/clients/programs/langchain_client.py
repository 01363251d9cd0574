"""What LangChain reads, as JSON: a completion and a chat, whole, streamed, several at a time."""

import asyncio
import json
import os
import sys
from typing import Literal

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict

shared = {"base_url": os.environ["BASE_URL"], "api_key": "none", "max_retries": 0}


class Animal(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: Literal["fox", "dog"]
    quick: bool


def completes(name: str) -> dict[str, object]:
    model = OpenAI(model=name, max_tokens=60, seed=7, temperature=1, **shared)
    told = model.generate(["import ", "class "])
    return {
        "whole": model.invoke("import "),
        "streamed": "".join(model.stream("import ")),
        "several": [each[0].text for each in told.generations],
        "usage": told.llm_output["token_usage"],
        "reason": told.generations[0][0].generation_info["finish_reason"],
    }


def chats(name: str) -> dict[str, object]:
    model = ChatOpenAI(
        model=name, max_tokens=20, seed=3, temperature=1, stream_usage=True, **shared
    )
    said = [SystemMessage("the fox"), HumanMessage("Hello"), AIMessage("hi"), HumanMessage("jumps")]
    whole = model.invoke(said)
    parts = list(model.stream(said))
    streamed = parts[0]
    for part in parts[1:]:
        streamed += part
    likely = model.bind(logprobs=True, top_logprobs=2).invoke(said)
    prompt = ChatPromptTemplate([("system", "the {animal}"), ("human", "{text}")])
    chain = prompt | model | StrOutputParser()
    longer = model.model_copy(update={"max_tokens": 400})
    animal = longer.with_structured_output(Animal, method="json_schema").invoke("Who is it?")
    return {
        "animal": animal.model_dump(),
        "whole": whole.content,
        "usage": whole.usage_metadata,
        "streamed": streamed.content,
        "streamed_usage": streamed.usage_metadata,
        "reason": streamed.response_metadata["finish_reason"],
        "logprobs": likely.response_metadata["logprobs"]["content"],
        "chain": chain.batch([{"animal": "fox", "text": x} for x in ("Hello", "jumps")]),
        "later": asyncio.run(model.ainvoke(said)).content,
    }


print(json.dumps({"completes": completes, "chats": chats}[sys.argv[1]](sys.argv[2])))
