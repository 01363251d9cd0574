"""The table of the commands of `concertina`: what each one does, and where it lives.

A command is imported only when it is used. This is the only module of `concertina` that imports
from `server`, `model`, `export` and `loadtest`, which are not installed with the client alone.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from concertina.cli.group import Command, command_line, explain, print_error
from concertina.cli.output import flush_output, open_standard_streams


def _demo() -> Any:
    from server.hosts.demo import demo

    return demo


def _demo_chat() -> Any:
    from server.hosts.demo_chat import demo_chat

    return demo_chat


def _serve() -> Any:
    from server.hosts.serve import serve

    return serve


def _gateway() -> Any:
    from server.http.command import gateway

    return gateway


def _keys() -> Any:
    from server.auth.keys_command import keys

    return keys


def _models() -> Any:
    from concertina.cli.models import models

    return models


def _generate() -> Any:
    from concertina.cli.generate import generate

    return generate


def _paint() -> Any:
    from concertina.cli.paint import paint

    return paint


def _score() -> Any:
    from concertina.cli.score import score

    return score


def _chat() -> Any:
    from concertina.cli.chat import chat

    return chat


def _tokenize() -> Any:
    from concertina.cli.models import tokenize

    return tokenize


def _sessions() -> Any:
    from concertina.cli.sessions import sessions

    return sessions


def _loadtest() -> Any:
    from loadtest.command import loadtest

    return loadtest


def _bench() -> Any:
    from loadtest.bench.command import bench

    return bench


def _data() -> Any:
    from model.data_command import data

    return data


def _train() -> Any:
    from model.command import train

    return train


def _convert() -> Any:
    from model.pretrained.command import convert

    return convert


def _uptrain() -> Any:
    from model.uptraining.command import uptrain

    return uptrain


def _export() -> Any:
    from export.command import export

    return export


def _prepare() -> Any:
    from server.hosts.prepare import prepare

    return prepare


def _compare() -> Any:
    from export.comparison.command import compare

    return compare


COMMANDS = {
    "demo": Command("Serve the bundled models and watch them write.", _demo),
    "demo-chat": Command("Make a model remember less, and chat with it.", _demo_chat),
    "serve": Command("Serve bundles over gRPC.", _serve),
    "gateway": Command("Answer OpenAI's HTTP API for a server.", _gateway),
    "keys": Command("Say who may call a server.", _keys),
    "models": Command("List what a server serves.", _models),
    "generate": Command("Write text as it is generated.", _generate),
    "chat": Command("Talk with a model.", _chat),
    "paint": Command("Paint an image as it is generated.", _paint),
    "score": Command("Measure how well a model predicts a file.", _score),
    "tokenize": Command("Show the tokens of a text.", _tokenize),
    "sessions": Command("Pause, continue, copy and move streams.", _sessions),
    "loadtest": Command("Drive a server hard and report.", _loadtest),
    "bench": Command("Compare with other engines.", _bench),
    "data": Command("Prepare training data.", _data),
    "train": Command("Train a model.", _train),
    "convert": Command("Take over a pretrained model.", _convert),
    "uptrain": Command("Make a model remember less.", _uptrain),
    "export": Command("Turn a checkpoint into a bundle.", _export),
    "prepare": Command("Convert and export, unless it is done.", _prepare),
    "compare": Command("Train patterns side by side.", _compare),
}


def main() -> None:
    """Runs the command line and exits: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    open_standard_streams()
    # gRPC's warnings would stand between a command's own lines.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        try:
            command_line(COMMANDS).main(prog_name="concertina")
        finally:
            flush_output()
    except BrokenPipeError:  # whoever read has read enough
        sys.exit(1)
    except Exception as error:
        if os.environ.get("CONCERTINA_TRACEBACK"):
            raise
        print_error(explain(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
