"""Strangers at the port of a job that runs: nothing that they do costs it a step."""

from __future__ import annotations

import contextlib
import random
import socket
from urllib.parse import urlsplit

import pytest
import zmq
from helpers.stage import GATE, Stage
from helpers.training import train

from torch_qgc.protocol import messages

pytestmark = pytest.mark.chaos

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + bytes(32)  # of ZMTP 3.0, of somebody without a key


def test_strangers_cost_a_job_no_step(stage: Stage) -> None:
    stage.start(train)
    endpoint = stage.note(0, "endpoint")
    parts = urlsplit(endpoint)
    with contextlib.ExitStack() as strangers, zmq.Context() as context:
        with stage.after(5):
            for opening in (
                b"",
                b"GET / HTTP/1.1\r\n\r\n",
                GREETING,
                GREETING[:11],
                random.Random(0).randbytes(1 << 16),
            ):
                for _ in range(4):
                    stranger = strangers.enter_context(socket.create_connection((parts.hostname, parts.port)))
                    with contextlib.suppress(OSError):  # it has been cut
                        stranger.sendall(opening)
            for keys in (None, zmq.curve_keypair()):
                dealer = strangers.enter_context(context.socket(zmq.DEALER))
                dealer.setsockopt(zmq.LINGER, 0)
                if keys is not None:
                    dealer.curve_publickey, dealer.curve_secretkey = keys
                    dealer.curve_serverkey = zmq.curve_keypair()[0]
                dealer.connect(endpoint)
                for message in (messages.Bye(0), messages.Fault(0, "go away")):
                    dealer.send(messages.encode_message(message))
            stage.until(lambda: stage.board.made_s[:, GATE - 1].all(), f"step {GATE - 1} of all")
            assert all(dealer.poll(0) == 0 for dealer in [dealer])
        stage.end()
    stage.assert_equal()
