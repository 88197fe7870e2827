"""The witness on a link answers with all that crossed it before the question."""

import secrets

from sidestep.lab.link import Tap
from tests.harness.netns import Pair, connect, listen

QUESTIONS = 300


def test_an_answer_has_what_came_before_the_question(link: Pair) -> None:
    """Each question right behind a word: the listener may be anywhere between the queue and its answer."""
    with Tap(link.outside_path, "eth0") as tap:
        with listen(link.outside_path, link.far(4), 80) as far, connect(link.pod_path, link.far(4), 80) as client:
            with far.accept()[0] as served:
                for number in range(1, QUESTIONS + 1):
                    word = secrets.token_hex(8).encode()
                    client.sendall(word)
                    assert served.recv(100) == word
                    out = [flow for flow in tap.flows() if flow.destination.port == 80]
                    assert [flow.payload_bytes for flow in out] == [number * len(word)]
    assert tap.flows()  # and when it has ended, everything
